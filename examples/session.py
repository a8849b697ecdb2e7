"""A conversation of two turns: the second one re-uses the KV cache of the first."""

import secrets
import sys

import grpc

from outrider.v1 import orchestrator_pb2 as pb
from outrider.v1 import orchestrator_pb2_grpc as rpc
from outrider.v1 import sampling_pb2

with grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as channel:
    orchestrator = rpc.OrchestratorServiceStub(channel)
    session_id = f"example-{secrets.token_hex(4)}"
    for turn, text in enumerate(("import os\n\nclass Stack:", "\n    def push(self, item):")):
        request = pb.GenerateRequest(
            session_id=session_id,
            create_session=turn == 0,
            text=text,
            sampling=sampling_pb2.SamplingParams(temperature=0, max_tokens=30),
        )
        for chunk in orchestrator.Generate(request):
            print(chunk.text, end="", flush=True)
        usage = chunk.result.usage
        print(f"\n-- prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached\n")
    orchestrator.DeleteSession(pb.DeleteSessionRequest(session_id=session_id))
