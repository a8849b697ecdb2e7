"""One generation: request, prompt, the loop of rounds, its state, its output recorded and streamed.

`generation` is the loop; `state` is pure. Transports are in `orchestrator.api`, replicas in
`orchestrator.replicas`, the choice of γ in `orchestrator.speculation`.
"""
