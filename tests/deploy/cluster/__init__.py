"""Runs the pods of an overlay as processes, each with its own network and root filesystem.

Emulated: commands, environment, users, read-only roots, volumes, probes, restarts, preStop, grace
periods, DNS names of Services. Not emulated: images (this machine's Python and Redis run), limits
of memory or CPU, network policies, scheduling. Linux and root only. All namespaces end with the
process.

    unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private \\
        python -m tests.deploy.cluster SCENARIO deploy/built/local.yaml DIRECTORY

SCENARIO: a name of `scenarios`. DIRECTORY must be empty; logs of the containers go to its `logs`.
"""
