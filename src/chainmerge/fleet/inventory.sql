-- SPDX-License-Identifier: Apache-2.0
-- What the last scan of each host has found. Running this again brings it up to date.
--
-- A document is text and not jsonb, which takes no names with undecodable bytes. A host can replace
-- its own one only, and neither it nor the history of its figures grows without end.

CREATE TABLE IF NOT EXISTS inventory (
    host text PRIMARY KEY,
    scanned_at bigint NOT NULL,
    document text NOT NULL CHECK (octet_length(document) <= 16777216)
);

CREATE TABLE IF NOT EXISTS inventory_points (
    host text NOT NULL,
    at bigint NOT NULL,
    longest bigint NOT NULL,
    occupied_bytes bigint NOT NULL,
    freed_bytes bigint NOT NULL,
    PRIMARY KEY (host, at)
);

-- Keeps what a scan has found, unless a later one is there.
CREATE OR REPLACE FUNCTION store_inventory(
    acting text, its_time bigint, its_document text, its_longest bigint, its_occupied bigint,
    its_freed bigint
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    INSERT INTO inventory (host, scanned_at, document) VALUES (acting, its_time, its_document)
        ON CONFLICT (host) DO UPDATE
            SET scanned_at = excluded.scanned_at, document = excluded.document
            WHERE inventory.scanned_at <= excluded.scanned_at;
    INSERT INTO inventory_points (host, at, longest, occupied_bytes, freed_bytes)
        VALUES (acting, its_time, its_longest, its_occupied, its_freed) ON CONFLICT DO NOTHING;
    DELETE FROM inventory_points WHERE host = acting AND at NOT IN
        (SELECT at FROM inventory_points WHERE host = acting ORDER BY at DESC LIMIT 500);
END $$;

REVOKE ALL ON FUNCTION store_inventory FROM PUBLIC;
GRANT EXECUTE ON FUNCTION store_inventory TO chainmerge_worker;
GRANT SELECT, DELETE ON inventory, inventory_points TO chainmerge_operator;
