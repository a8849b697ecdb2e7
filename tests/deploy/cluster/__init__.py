"""The pods of an overlay as processes on this machine, each with a network and a root of its own.

What of Kubernetes it is: containers' commands, environment, users, read-only roots and volumes,
probes as the kubelet makes them, restarts, preStop and grace, names of Services. What it is not: no
images (the machine's own Python and Redis run), no limits of memory or cores, no policies, no
scheduling. Linux and root only; everything is in namespaces that end with the process.

    unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private \\
        python -m tests.deploy.cluster PLAY deploy/built/local.yaml DIRECTORY

PLAY: one of `plays`. DIRECTORY is empty, and has each container's log in `logs` afterwards.
"""
