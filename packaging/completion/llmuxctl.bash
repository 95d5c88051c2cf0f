# Completion of llmuxctl for bash 4.4 or newer. The program is asked only when a word is to be completed.

_llmuxctl_completion() {
    local IFS=$'\n' rest=${COMP_LINE:0:COMP_POINT} count=0 word line value answer
    # Words are counted here: bash breaks them at colons, which a model's name may have.
    local token=$'^[[:space:]]*(\\\\.|"[^"]*"|\'[^\']*\'|[^[:space:]\\\\"\'])+[[:space:]]+'
    while [[ $rest =~ $token ]]; do
        rest=${rest:${#BASH_REMATCH[0]}}
        count=$((count + 1))
    done
    word=$rest
    answer=$(COMP_WORDS=${COMP_LINE:0:COMP_POINT} COMP_CWORD=$count _LLMUXCTL_COMPLETE=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    for line in $answer; do
        value=${line#*,}
        case $line in
        plain,*)
            [[ $word == [\"\']* ]] || printf -v value %q "$value"
            # What is before the last colon stays on the line as it is.
            [[ $COMP_WORDBREAKS != *:* ]] || value=${value#"${word%"${word##*:}"}"}
            COMPREPLY+=("$value")
            ;;
        dir,*) compopt -o dirnames ;;
        file,*) compopt -o default ;;
        esac
    done
}

complete -o nosort -F _llmuxctl_completion llmuxctl
