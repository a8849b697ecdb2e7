"""Eight generations at once with the asynchronous client, as a service would have them."""

import asyncio
import sys

from outrider.client import AsyncClient


async def main(endpoint: str) -> None:
    async with AsyncClient(endpoint) as client:
        streams = [client.generate("import ", seed=seed, max_tokens=20) for seed in range(8)]
        for result in await asyncio.gather(*(stream.result() for stream in streams)):
            print(repr(result.text))


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
