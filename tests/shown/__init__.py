"""Commands that README.md, docs/get-started.md and docs/how-to show, run as they are shown.

`plan` says what a page supposes, what is replaced and what is not run; `blocks` reads the pages,
`shell` runs commands. `make shown` runs them all; the default suite checks that each block is run
or listed.
"""
