"""One generation: request and validation, prompt, loop of rounds, state, recording and output.

`generation` is the loop; `state` is pure. Transports are in `orchestrator.api`, replicas in
`orchestrator.replicas`, the choice of γ in `orchestrator.speculation`.
"""
