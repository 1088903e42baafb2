"""`cosmos3 completion`: scripts with which a shell completes groups, options and keys. Imports no torch.

Hydra's own scripts work for `python launch.py` and for an installed command. These scripts also work for any
python before any launch.py, and for an alias. They pass Hydra a command line that it knows, and show its answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from cosmos3_pipeline.config.arguments import Arguments

USAGE = 3

DESCRIPTION = """\
Make TAB complete groups, options and keys after `cosmos3`, `python launch.py` and an alias `launch`:

  eval "$(cosmos3 completion bash)"          in ~/.bashrc
  eval "$(cosmos3 completion zsh)"           in ~/.zshrc, after compinit
  cosmos3 completion fish | source           in ~/.config/fish/config.fish
"""

# The words before the cursor become a command line of `cosmos3`, under whatever name the program was started.
BASH = """\
_cosmos3_complete() {
    local words=(${COMP_LINE:0:$COMP_POINT}) program skip=1 choices rest word=""
    program="${words[0]}"
    case "${program##*/}" in
        python*)
            [[ "${words[1]}" == *launch.py ]] || return
            program="$program ${words[1]}"
            skip=2 ;;
        launch)
            program="${BASH_ALIASES[launch]:-launch}" ;;
    esac
    rest="${words[*]:$skip}"
    [[ "${COMP_LINE:$COMP_POINT-1:1}" == " " ]] && rest="$rest " || word="${words[${#words[@]}-1]}"
    rest="cosmos3 $rest"
    choices=$(COMP_LINE="$rest" COMP_POINT=${#rest} $program -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _cosmos3_complete cosmos3 launch python python3
"""
ZSH = """\
_cosmos3_complete() {
    local program="${words[1]}" skip=2 line
    case "${program:t}" in
        python*)
            [[ "${words[2]}" == *launch.py ]] || return 1
            program="$program ${words[2]}"
            skip=3 ;;
        launch)
            program="${aliases[launch]:-launch}" ;;
    esac
    line="cosmos3 ${words[$skip,$CURRENT]}"
    local -a choices
    choices=(${(z)"$(COMP_LINE="$line" COMP_POINT=${#line} ${=program} -sc query=bash 2>/dev/null)"})
    compadd -S '' -a choices
}
compdef _cosmos3_complete cosmos3 launch python python3
"""
FISH = """\
function _cosmos3_complete
    set -l words (commandline -opc)
    set -l program $words[1]
    set -l skip 2
    if string match -qr 'python[0-9.]*$' -- $program
        string match -q '*launch.py' -- $words[2]; or return
        set program $words[1..2]
        set skip 3
    end
    set -l line "cosmos3 $words[$skip..-1] "(commandline -ct)
    set -l point (string length -- "$line")
    env COMP_LINE="$line" COMP_POINT=$point $program -sc query=bash 2>/dev/null | string split -n ' '
end
for program in cosmos3 python python3
    complete -c $program -f -a '(_cosmos3_complete)'
end
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(arguments: Sequence[str]) -> int:
    """Print the script for a shell; returns the exit code."""
    parser = Arguments("cosmos3 completion", DESCRIPTION, usage=USAGE)
    parser.add_argument("shell", choices=SCRIPTS)
    asked = parser.parse(arguments)
    print(SCRIPTS[asked.shell], end="")
    return 0


def cleaned(choices: str) -> str:
    """Hydra's answer without internal groups, and with enum values spelt as in YAML."""
    words = [word for word in choices.split() if not word.startswith("_")]
    return " ".join(_as_yaml(word) for word in words)


def _as_yaml(word: str) -> str:
    """`model.dtype=float32`, where Hydra says `model.dtype=Dtype.float32`."""
    key, equals, value = word.partition("=")
    kind, dot, name = value.partition(".")
    return f"{key}={name}" if equals and dot and kind.isidentifier() and kind[0].isupper() else word
