"""Break a stream after ten tokens, then resume it: no token is lost or repeated.

Any orchestrator with the same Redis can resume it; here it is the same orchestrator.
"""

import secrets
import sys

import grpc

from outrider.v1 import orchestrator_pb2 as pb
from outrider.v1 import orchestrator_pb2_grpc as rpc
from outrider.v1 import sampling_pb2

with grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as channel:
    orchestrator = rpc.OrchestratorServiceStub(channel)
    sampling = sampling_pb2.SamplingParams(temperature=0, max_tokens=40)
    whole = [
        token_id
        for chunk in orchestrator.Generate(pb.GenerateRequest(text="import re", sampling=sampling))
        for token_id in chunk.token_ids
    ]

    session_id = f"example-{secrets.token_hex(4)}"
    request = pb.GenerateRequest(
        session_id=session_id, create_session=True, text="import re", sampling=sampling
    )
    received: list[int] = []
    stream = orchestrator.Generate(request)
    for chunk in stream:
        received += chunk.token_ids
        if len(received) >= 10:
            stream.cancel()  # like a lost connection
            break
    print(f"interrupted after {len(received)} tokens")

    request = pb.GenerateRequest(session_id=session_id, resume_from=len(received))
    for chunk in orchestrator.Generate(request):
        received += chunk.token_ids
    print(f"resumed to {len(received)} tokens")
    print(f"equal to the uninterrupted output: {received == whole}")
    orchestrator.DeleteSession(pb.DeleteSessionRequest(session_id=session_id))
