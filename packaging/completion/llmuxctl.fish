# Completion of llmuxctl for fish. The program is asked only when a word is to be completed.

function __llmuxctl_complete
    set -l before (commandline -cop)
    set -l word (string unescape -- (commandline -ct))
    set -l line (string escape -- $before | string join ' ')" "(string escape -- "$word")
    test -n "$word"; or set line (string escape -- $before | string join ' ')
    for answer in (COMP_WORDS="$line" COMP_CWORD="$word" _LLMUXCTL_COMPLETE=fish_complete $before[1] 2>/dev/null)
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case plain
                echo $parts[2]
            case dir
                __fish_complete_directories $word
            case file
                __fish_complete_path $word
        end
    end
end

complete --command llmuxctl --no-files --keep-order --arguments '(__llmuxctl_complete)'
