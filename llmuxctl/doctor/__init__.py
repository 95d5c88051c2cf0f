"""`llmuxctl doctor`: what on this box keeps llmuxd or its engines from working, and what to do about it.

`box` is the only module that touches the machine, `situation` says what there is to look at, and each check is a small
function of that; `examine` has the table of them. Nothing here changes anything.
"""
