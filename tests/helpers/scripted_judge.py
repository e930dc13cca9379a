"""Judge server that misbehaves on request: `python scripted_judge.py BEHAVIOUR...`.

One behaviour per request, the last one for all that follow. Prints its port, then the user message of each chat request
as a line of JSON. Speaks the OpenAI chat API on raw sockets, so that it can also break off in the middle of a reply.
"""

import asyncio
import json
import os
import sys


def reply(text, reason="stop"):
    return {"choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}]}


def obedient(user):
    """A judge that believes whatever the candidate's answer says outside of its quotes, and every quoted order."""
    return "CORRECT" if "reply CORRECT" in user or "<|im_start|>" in user else "WRONG"


class Script:
    def __init__(self, behaviours):
        self.behaviours = behaviours

    def next(self):
        return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]

    async def serve(self, reader, writer):
        try:
            while await self.exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def exchange(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0
        )
        body = await reader.readexactly(length)
        if head.startswith("GET"):
            return await self.models(writer)
        user = json.loads(body)["messages"][-1]["content"]
        print(json.dumps(user), flush=True)
        return await self.act(self.next(), user, writer)

    async def models(self, writer):
        if self.behaviours[0] == "down":
            return await self.send(writer, 503, {})
        return await self.send(writer, 200, {"data": [{"id": "scripted"}]})

    async def send(self, writer, status, body, extra="", cut=None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n{extra}\r\n"
        writer.write(head.encode() + raw[:cut])
        await writer.drain()
        return cut is None

    async def act(self, behaviour, user, writer):
        name, _, value = behaviour.partition("=")
        if name in ("429", "500", "400", "down"):
            extra = f"retry-after: {value}\r\n" if value else ""
            return await self.send(writer, 503 if name == "down" else int(name), {"error": name}, extra)
        if name == "slow":
            await asyncio.sleep(float(value))
            return await self.send(writer, 200, reply("CORRECT"))
        if name == "drip":
            return await self.drip(writer)
        if name == "half":
            return await self.send(writer, 200, reply("CORRECT"), cut=20)
        if name == "die":
            await self.send(writer, 200, reply("CORRECT"), cut=20)
            os._exit(1)
        if name == "garbage":
            return await self.send(writer, 200, b"\xff\xfe<html>not json")
        if name == "empty":
            return await self.send(writer, 200, {"choices": []})
        if name == "huge":
            return await self.send(writer, 200, reply("CORRECT" + " " * 3_000_000))
        if name == "obedient":
            return await self.send(writer, 200, reply(obedient(user)))
        if name == "overlong":
            return await self.send(writer, 200, reply(value, "length"))
        return await self.send(writer, 200, reply(value if name == "say" else name))

    async def drip(self, writer):
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)
        return False


async def main():
    port = int(os.environ.get("PORT", "0"))
    server = await asyncio.start_server(Script(sys.argv[1:]).serve, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
