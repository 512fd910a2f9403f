-- SPDX-License-Identifier: Apache-2.0
-- What a fleet keeps beside its queue. Running this again brings it up to date.
--
-- Workers reach these tables by functions only, each of which acts for one host, and for the
-- login that the host has registered with. Reports and progress are text, as JSON that names a
-- file with undecodable bytes is none that the type jsonb takes.

CREATE TABLE IF NOT EXISTS installed (
    component text PRIMARY KEY,
    version text NOT NULL
);

CREATE TABLE IF NOT EXISTS hosts (
    host text PRIMARY KEY,
    machine_id text NOT NULL,
    login name NOT NULL,
    version text NOT NULL,
    drained boolean NOT NULL DEFAULT false,
    drained_now boolean NOT NULL DEFAULT false,
    seen timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS limits (
    key text PRIMARY KEY,
    most integer NOT NULL CHECK (most >= 0),
    paused boolean NOT NULL DEFAULT false
);

CREATE TABLE IF NOT EXISTS leases (
    job bigint NOT NULL,
    key text NOT NULL,
    host text NOT NULL,
    taken timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job, key)
);
CREATE INDEX IF NOT EXISTS leases_key ON leases (key);

CREATE TABLE IF NOT EXISTS progress (
    job bigint PRIMARY KEY,
    line text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS wishes (
    job bigint PRIMARY KEY
);

-- Domains that jobs are for and that do not run where they did; the first host that has one.
CREATE TABLE IF NOT EXISTS sought (
    job bigint PRIMARY KEY,
    host text NOT NULL,
    domain text NOT NULL,
    found_on text
);

CREATE TABLE IF NOT EXISTS results (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    job bigint NOT NULL,
    host text NOT NULL,
    outcome text NOT NULL,
    exit_code integer,
    error_code text,
    message text NOT NULL DEFAULT '',
    report text,
    ended timestamptz NOT NULL DEFAULT now(),
    superseded boolean NOT NULL DEFAULT false
);
CREATE UNIQUE INDEX IF NOT EXISTS results_of_job ON results (job) WHERE NOT superseded;

-- What the engine stumbles over, or would mark as failed without a result.
ALTER TABLE procrastinate_jobs DROP CONSTRAINT IF EXISTS job_of_a_fleet;
ALTER TABLE procrastinate_jobs ADD CONSTRAINT job_of_a_fleet
    CHECK (task_name = 'chainmerge.fleet' AND jsonb_typeof(args) = 'object') NOT VALID;

-- The keys among those asked for that nobody may take now.
CREATE OR REPLACE FUNCTION full_keys(asked text[]) RETURNS text[]
LANGUAGE sql STABLE AS $$
    SELECT coalesce(array_agg(key), '{}')
    FROM (SELECT DISTINCT unnest(asked) AS key) AS wanted
    LEFT JOIN limits USING (key)
    WHERE coalesce(paused, false)
        -- Whoever wants a limit for the whole fleet sets one.
        OR coalesce(most, CASE key WHEN 'fleet' THEN 2147483647 ELSE 1 END)
            <= (SELECT count(*) FROM leases WHERE leases.key = wanted.key)
$$;

CREATE OR REPLACE FUNCTION require_login(acting text) RETURNS void
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM hosts WHERE host = acting AND login = session_user) THEN
        RAISE insufficient_privilege USING MESSAGE = format('%s is not the host of this login', acting);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION queues_of_login() RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
    SELECT 'host.' || host FROM hosts WHERE login = session_user
$$;

-- A host has a say in the jobs on its own queue only.
CREATE OR REPLACE FUNCTION is_own_job(acting text, asked bigint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM procrastinate_jobs WHERE id = asked AND queue_name = 'host.' || acting
    )
$$;

-- What a job may hold on a host: what its record says, and what is the host's own.
CREATE OR REPLACE FUNCTION may_hold(acting text, asked bigint, wanted text[]) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT wanted <@ (
        ARRAY['fleet', 'host/' || acting, 'scan/' || acting]
        || coalesce((
            SELECT array_agg(key) FROM procrastinate_jobs, jsonb_array_elements_text(
                CASE jsonb_typeof(args -> 'record' -> 'keys')
                WHEN 'array' THEN args -> 'record' -> 'keys' ELSE '[]' END
            ) AS key
            WHERE id = asked
        ), '{}')
    )
$$;

-- Registers a host for this session; says why not, or nothing.
CREATE OR REPLACE FUNCTION register_host(acting text, machine text, program text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
DECLARE
    known hosts;
BEGIN
    -- Ends with the session: whoever comes back after a lost connection waits for the old one.
    IF NOT pg_try_advisory_lock(hashtext('chainmerge-hosts'), hashtext(acting)) THEN
        RETURN 'connected';
    END IF;
    -- Or a login that was stolen would be good for all names that nobody has.
    IF EXISTS (SELECT FROM hosts WHERE login = session_user AND host <> acting) THEN
        PERFORM pg_advisory_unlock(hashtext('chainmerge-hosts'), hashtext(acting));
        RETURN 'login';
    END IF;
    INSERT INTO hosts (host, machine_id, login, version)
        VALUES (acting, machine, session_user, program) ON CONFLICT DO NOTHING;
    SELECT * FROM hosts WHERE host = acting INTO known;
    IF known.machine_id = '' THEN
        -- Whoever had the name was released.
        UPDATE hosts SET machine_id = machine, login = session_user WHERE host = acting
            RETURNING * INTO known;
    END IF;
    IF known.machine_id <> machine OR known.login <> session_user THEN
        PERFORM pg_advisory_unlock(hashtext('chainmerge-hosts'), hashtext(acting));
        RETURN 'another';
    END IF;
    UPDATE hosts SET version = program, seen = now() WHERE host = acting;
    RETURN '';
END $$;

-- All or none of the keys of each candidate, in the order given; returns whose were taken.
CREATE OR REPLACE FUNCTION take_leases(acting text, candidates jsonb) RETURNS SETOF bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
DECLARE
    candidate jsonb;
    candidate_job bigint;
    wanted text[];
    taken_up text[];
    -- Of earlier runs, whose children may have gone on.
    held bigint[] := ARRAY(SELECT DISTINCT job FROM leases WHERE host = acting);
BEGIN
    PERFORM require_login(acting);
    -- One at a time: two that count at once would both find room for one. By a lock that logins of
    -- hosts cannot take otherwise, and hold.
    PERFORM FROM installed WHERE component = 'fleet' FOR UPDATE;
    -- Keys of images are thousands, and jobs that want the same one few. So whether somebody has one
    -- is asked last, and of those only that could start otherwise.
    SELECT full_keys(array_agg(key)) INTO taken_up
        FROM jsonb_array_elements(candidates) AS each,
            jsonb_array_elements_text(each -> 'keys') AS key
        WHERE NOT starts_with(key, 'image/');
    FOR candidate IN SELECT * FROM jsonb_array_elements(candidates) LOOP
        candidate_job := (candidate ->> 'job')::bigint;
        wanted := ARRAY(SELECT jsonb_array_elements_text(candidate -> 'keys'));
        IF candidate_job = ANY (held) THEN
            RETURN NEXT candidate_job;
        ELSIF NOT wanted && taken_up
            AND is_own_job(acting, candidate_job)
            AND may_hold(acting, candidate_job, wanted)
            AND NOT EXISTS (SELECT FROM hosts WHERE host = acting AND drained)
            AND NOT EXISTS (SELECT FROM results WHERE job = candidate_job AND NOT superseded)
            AND cardinality(full_keys(wanted)) = 0
        THEN
            INSERT INTO leases (job, key, host)
                SELECT DISTINCT candidate_job, key, acting FROM unnest(wanted) AS key;
            taken_up := taken_up || full_keys(ARRAY(
                SELECT key FROM unnest(wanted) AS key WHERE NOT starts_with(key, 'image/')
            ));
            RETURN NEXT candidate_job;
        END IF;
    END LOOP;
END $$;

-- Says that a host is alive, and how far its merges are. Returns what it has to know: jobs that
-- somebody wants to end, jobs that have ended, whether it is to stop what runs, which of the keys
-- that its jobs want nobody may take now, which of its jobs have theirs, domains that jobs are for
-- and that nobody has found, and where those of its own jobs run.
DROP FUNCTION IF EXISTS speak(text, bigint[], bigint[], text[]);
CREATE OR REPLACE FUNCTION speak(
    acting text, in_hand bigint[], running bigint[], lines text[], wanted text[]
)
RETURNS TABLE (
    unwanted bigint[], ended bigint[], stop_all boolean, taken_up text[], holding bigint[],
    sought text[], found_jobs bigint[], found_on text[]
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    UPDATE hosts SET seen = now() WHERE host = acting;
    INSERT INTO progress (job, line)
        SELECT job, line FROM unnest(running, lines) AS told (job, line)
            JOIN leases USING (job) WHERE leases.host = acting GROUP BY job, line
        ON CONFLICT (job) DO UPDATE SET line = excluded.line, at = now();
    RETURN QUERY SELECT
        ARRAY(SELECT job FROM wishes WHERE job = ANY (in_hand)),
        ARRAY(SELECT job FROM results WHERE job = ANY (in_hand) AND NOT superseded),
        (SELECT drained_now FROM hosts WHERE host = acting),
        full_keys(wanted),
        ARRAY(SELECT DISTINCT job FROM leases WHERE host = acting),
        ARRAY(SELECT DISTINCT domain FROM chainmerge.sought AS one WHERE one.found_on IS NULL),
        ARRAY(SELECT job FROM chainmerge.sought AS one
            WHERE job = ANY (in_hand) AND one.found_on IS NOT NULL ORDER BY job),
        ARRAY(SELECT one.found_on FROM chainmerge.sought AS one
            WHERE job = ANY (in_hand) AND one.found_on IS NOT NULL ORDER BY job);
END $$;

CREATE OR REPLACE FUNCTION seek_domain(acting text, asked bigint, wanted text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    INSERT INTO sought (job, host, domain)
        SELECT asked, acting, wanted WHERE is_own_job(acting, asked)
        ON CONFLICT (job) DO UPDATE SET host = acting, domain = wanted, found_on = NULL;
END $$;

CREATE OR REPLACE FUNCTION run_here(acting text, domains text[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    UPDATE sought SET found_on = acting WHERE domain = ANY (domains) AND found_on IS NULL;
END $$;

-- Frees what a job holds that goes back to the queue.
CREATE OR REPLACE FUNCTION put_back(acting text, asked bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    DELETE FROM leases WHERE job = asked AND host = acting;
    DELETE FROM progress WHERE job = asked AND is_own_job(acting, asked);
    DELETE FROM sought WHERE job = asked AND is_own_job(acting, asked);
END $$;

-- Keeps what became of a job, and frees what it holds. To do so again changes nothing.
CREATE OR REPLACE FUNCTION end_job(
    acting text, asked bigint, its_outcome text, its_exit_code integer, its_error_code text,
    its_message text, its_report text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = chainmerge, pg_temp AS $$
BEGIN
    PERFORM require_login(acting);
    DELETE FROM leases WHERE job = asked AND host = acting;
    -- A worker that comes late, with a job that is another's by now, is not heard.
    IF NOT is_own_job(acting, asked) THEN
        RETURN;
    END IF;
    INSERT INTO results (job, host, outcome, exit_code, error_code, message, report)
        VALUES (asked, acting, its_outcome, its_exit_code, its_error_code, its_message, its_report)
        ON CONFLICT DO NOTHING;
    DELETE FROM progress WHERE job = asked;
    DELETE FROM wishes WHERE job = asked;
    DELETE FROM sought WHERE job = asked;
END $$;

-- A host sees and changes the rows on its own queue. It may hand on what follows a domain, and so
-- has to see it wherever it lies: a row must be seen by whoever has changed it.
ALTER TABLE procrastinate_jobs ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS of_operator ON procrastinate_jobs;
CREATE POLICY of_operator ON procrastinate_jobs TO chainmerge_operator USING (true);
DROP POLICY IF EXISTS seen_by_host ON procrastinate_jobs;
CREATE POLICY seen_by_host ON procrastinate_jobs FOR SELECT TO chainmerge_worker
    USING (
        queue_name = ANY (ARRAY(SELECT queues_of_login()))
        OR args -> 'record' ->> 'action' = 'live-merge'
    );
DROP POLICY IF EXISTS changed_by_host ON procrastinate_jobs;
CREATE POLICY changed_by_host ON procrastinate_jobs FOR UPDATE TO chainmerge_worker
    USING (queue_name = ANY (ARRAY(SELECT queues_of_login())))
    WITH CHECK (
        queue_name = ANY (ARRAY(SELECT queues_of_login()))
        OR args -> 'record' ->> 'action' = 'live-merge'
    );

-- The database is the fleet's alone. What all may do in one by default, a host need not.
REVOKE ALL ON SCHEMA public FROM PUBLIC;
DO $$ BEGIN
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END $$;

CREATE INDEX IF NOT EXISTS jobs_by_label ON procrastinate_jobs (queueing_lock);
CREATE INDEX IF NOT EXISTS jobs_not_ended ON procrastinate_jobs (queue_name, priority DESC, id)
    WHERE status IN ('todo', 'doing');

-- Jobs that have not ended: so many, first those that run, then the first ones of each host.
CREATE OR REPLACE FUNCTION open_jobs(most integer) RETURNS SETOF bigint
LANGUAGE sql STABLE AS $$
    SELECT id FROM (
        SELECT id, row_number() OVER (PARTITION BY queue_name ORDER BY priority DESC, id) AS place,
            EXISTS (SELECT FROM leases WHERE job = one.id) AS runs
        FROM procrastinate_jobs AS one
        WHERE status IN ('todo', 'doing')
            AND NOT EXISTS (SELECT FROM results WHERE job = one.id AND NOT superseded)
    ) AS found
    ORDER BY runs DESC, place, id LIMIT most
$$;

CREATE OR REPLACE FUNCTION counted_jobs() RETURNS TABLE (host text, running bigint, waiting bigint)
LANGUAGE sql STABLE AS $$
    SELECT substr(queue_name, 6), count(*) FILTER (WHERE runs), count(*) FILTER (WHERE NOT runs)
    FROM (
        SELECT queue_name, EXISTS (SELECT FROM leases WHERE job = one.id) AS runs
        FROM procrastinate_jobs AS one
        WHERE status IN ('todo', 'doing')
            AND NOT EXISTS (SELECT FROM results WHERE job = one.id AND NOT superseded)
    ) AS found
    GROUP BY queue_name
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA chainmerge FROM PUBLIC;
GRANT USAGE ON SCHEMA chainmerge TO chainmerge_worker, chainmerge_operator;

-- A worker claims and ends jobs, and can neither add any nor change what one is.
GRANT SELECT ON procrastinate_jobs TO chainmerge_worker;
GRANT UPDATE (status, attempts, abort_requested, worker_id, scheduled_at, priority, queue_name, lock)
    ON procrastinate_jobs TO chainmerge_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON procrastinate_workers TO chainmerge_worker;
GRANT SELECT, INSERT ON procrastinate_events TO chainmerge_worker;
GRANT SELECT ON procrastinate_periodic_defers TO chainmerge_worker;
GRANT SELECT ON installed TO chainmerge_worker;
GRANT EXECUTE ON FUNCTION
    queues_of_login, register_host, take_leases, speak, put_back, end_job, seek_domain, run_here
    TO chainmerge_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chainmerge TO chainmerge_operator;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA chainmerge TO chainmerge_worker, chainmerge_operator;
DO $$
DECLARE
    one regprocedure;
BEGIN
    -- The queue's own functions act with the rights of whoever calls them.
    FOR one IN SELECT oid FROM pg_proc
        WHERE pronamespace = 'chainmerge'::regnamespace AND NOT prosecdef
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO chainmerge_worker, chainmerge_operator', one);
    END LOOP;
END $$;
