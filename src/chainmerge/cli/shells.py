# SPDX-License-Identifier: Apache-2.0
"""Completion in bash, zsh and fish, by click's protocol.

A script that the shell reads asks the program, by an environment variable, what a word may
become. Scripts are our own because names of images and bitmaps may hold what a shell takes apart:
spaces, commas, quotes; and because a directory is not the end of a name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Final

from click.shell_completion import (
    BashComplete,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

from chainmerge.cli.commands import COMPLETION_VARIABLE
from chainmerge.errors import ExitCode

if TYPE_CHECKING:
    from click import Command
    from click.shell_completion import CompletionItem

PROGRAM: Final = "chainmerge"

_BASH: Final = """\
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} rest piece before="" split_off="" kind value index
    local -a whole=()
    COMPREPLY=()
    # Bash takes words apart at each of $COMP_WORDBREAKS, and replaces the last piece only, with
    # the @ before it, if there is one.
    for ((index = 0; index <= COMP_CWORD; index++)); do
        rest=${line#"${line%%%%[![:space:]]*}"}
        piece=${COMP_WORDS[index]}
        ((index < COMP_CWORD)) || piece=$rest
        if [[ $rest == "$line" ]] && ((index)); then
            [[ $before == *@ ]] || split_off=${whole[-1]}
            whole[-1]+=$piece
            [[ ${piece//["${COMP_WORDBREAKS//@}"]} ]] || split_off=${whole[-1]}
        else
            split_off=""
            whole+=("$piece")
        fi
        line=${rest#"$piece"}
        before=$piece
    done
    # Taken apart here: what "read" splits loses a comma at its end.
    while IFS= read -r value; do
        kind=${value%%%%,*} value=${value#*,}
        [[ $value != *[=/] ]] || compopt -o nospace
        case $kind in
            plain)
                printf -v value %%q "$value"
                COMPREPLY+=("$value")
                ;;
            image)
                compopt -o filenames
                COMPREPLY+=("$value")
                ;;
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
        esac
    done < <(
        IFS=$'\\n'
        env COMP_WORDS="${whole[*]}" COMP_CWORD="$((${#whole[@]} - 1))" \
COMP_SPLIT_OFF="$split_off" %(complete_var)s=bash_complete "$1"
    )
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH: Final = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a answers names unfinished described images folders
    local kind value about
    (( $+commands[%(prog_name)s] )) || return 1
    answers=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT - 1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")
    # What is answered is the value of an option alone.
    compset -P 1 '-*='
    for kind value about in "${answers[@]}"; do
        case $kind in
            plain)
                if [[ $value == *[=/] ]]; then unfinished+=("$value")
                elif [[ $about == _ ]]; then names+=("$value")
                else described+=("$value:$about")
                fi
                ;;
            image)
                if [[ $value == */ ]]; then folders+=("$value"); else images+=("$value"); fi
                ;;
            file) _path_files ;;
            dir) _path_files -/ ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#names )) && compadd -U -i "$IPREFIX" -V unsorted -a names
    (( $#unfinished )) && compadd -U -i "$IPREFIX" -V unsorted -S '' -a unfinished
    (( $#images )) && compadd -U -i "$IPREFIX" -f -a images
    (( $#folders )) && compadd -U -i "$IPREFIX" -f -S '' -a folders
    return 0
}

# A function that zsh loads by its name is this text: the first time, and each time after it.
if [[ $zsh_eval_context[-1] == (loadautofunc|shfunc) ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH: Final = """\
function %(complete_func)s
    set -l answers (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
COMP_CWORD=(commandline -t) %(prog_name)s)
    # What is answered is the value of an option alone.
    set -l option (string match -r -- '^-[^=]*=' (commandline -t))
    or set option ""
    for answer in $answers
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case plain image
                echo $option$parts[2]
            case file
                printf '%%s\\n' $option(__fish_complete_path $parts[2])
            case dir
                printf '%%s\\n' $option(__fish_complete_directories $parts[2] "")
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Bash(BashComplete):
    source_template: ClassVar[str] = _BASH

    def source(self) -> str:
        # Not click's, which starts a bash to see how old it is.
        return ShellComplete.source(self)

    def format_completion(self, item: CompletionItem[Any]) -> str:
        split_off = _value_in(os.environ.get("COMP_SPLIT_OFF", ""))
        value = item.value.removeprefix(split_off)
        # Bash puts a slash after a directory itself, whose whole name it knows.
        if item.type == "image" and not split_off:
            value = value.removesuffix("/")
        return f"{item.type},{value}"


def _value_in(beginning: str) -> str:
    """What the beginning of a word, as it was typed, has of a value that can be completed."""
    typed = "".join(split_arg_string(beginning))
    return typed.partition("=")[2] if typed.startswith("-") else typed


class _Zsh(ZshComplete):
    source_template: ClassVar[str] = _ZSH


class _Fish(FishComplete):
    source_template: ClassVar[str] = _FISH


SHELLS: Final = ("bash", "zsh", "fish")


def script_for(shell: str, command: Command) -> str:
    """Return what a shell has to read so that it completes words of the command."""
    return _completion_of(shell)(command, {}, PROGRAM, COMPLETION_VARIABLE).source()


def answer_shell(instruction: str, command: Command) -> int:
    """Print what the word that the environment names may become; return an exit status."""
    for shell in SHELLS:
        add_completion_class(_completion_of(shell))
    try:
        return shell_complete(command, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    except Exception:  # noqa: BLE001 (what is said here would stand in the line that is typed)
        return ExitCode.FAILED


def _completion_of(shell: str) -> type[ShellComplete]:
    return {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}[shell]
