"""Stream one generation over gRPC, then print the acceptance rate."""

import sys

import grpc

from outrider.v1 import orchestrator_pb2 as pb
from outrider.v1 import orchestrator_pb2_grpc as rpc
from outrider.v1 import sampling_pb2

with grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as channel:
    sampling = sampling_pb2.SamplingParams(temperature=0, max_tokens=60)
    request = pb.GenerateRequest(text="def fibonacci(n):", sampling=sampling)
    for chunk in rpc.OrchestratorServiceStub(channel).Generate(request):
        print(chunk.text, end="", flush=True)
    print(f"\n\nacceptance rate: {chunk.result.speculation.acceptance_rate:.2f}")
