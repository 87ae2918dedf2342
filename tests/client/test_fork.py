"""Clients and processes: forkserver and spawn work, fork is refused with what to do instead."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each case runs in a fresh interpreter: the test process itself may have live clients already.
PRELUDE = """
import multiprocessing, sys
import numpy as np
from genssl import VariantClient
from genssl.errors import UserError
from genssl.variants.prefetch import loop as background

IMAGES = [np.full((1, 8, 8), level, np.uint8) for level in range(3)]

def ask(client, results):
    try:
        results.put(client.variants(IMAGES, 0).images.tolist())
    except UserError as error:
        results.put(f"{type(error).__name__}: {error}")

def in_child(method, client):
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=ask, args=(client, results))
    child.start()
    found = results.get(timeout=60)
    child.join(60)
    return found, child.exitcode

if __name__ == "__main__":
    client = VariantClient(sys.argv[1], allow_fork="allow" in sys.argv)
"""


def run(folder, address: str, body: str, *arguments: str) -> str:
    script = folder / "script.py"
    script.write_text(PRELUDE + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    done = subprocess.run(
        [sys.executable, str(script), address, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_used_client_goes_on_in_children_that_start_afresh(server, tmp_path, method):
    body = f"""
here = client.variants(IMAGES, 0).images
there, code = in_child({method!r}, client)
print(code, np.abs(here.astype(int) - np.array(there)).max() <= 1)
"""
    assert run(tmp_path, server.address, body) == "0 True"


def test_a_child_forked_from_a_live_client_is_told_what_to_do(server, tmp_path):
    body = """
client.variants(IMAGES, 0)
there, code = in_child("fork", client)
print(code, there)
print(client.variants(IMAGES, 1).images.shape)
"""
    said = run(tmp_path, server.address, body)
    assert said.startswith("0 UserError: gRPC does not survive fork")
    assert "multiprocessing_context='forkserver'" in said
    assert said.endswith("(3, 3, 8, 8)"), "the parent is not disturbed"


def test_a_client_that_was_never_used_may_be_forked(server, tmp_path):
    body = """
there, code = in_child("fork", client)
print(code, np.array(there).shape)
"""
    assert run(tmp_path, server.address, body) == "0 (3, 3, 8, 8)"


@pytest.mark.parametrize(
    ("parent", "child"), [("VariantClient", "Async"), ("Async", "VariantClient"), ("Async", "Async")]
)
def test_clients_of_either_kind_are_refused_in_a_child_forked_from_either_kind(server, tmp_path, parent, child):
    """All of these would end in a crash of the child inside gRPC."""
    body = f"""
import asyncio, os
from genssl import AsyncVariantClient

async def hold():
    other = AsyncVariantClient(sys.argv[1])
    await other.variants(IMAGES, 0, deadline=30)
    return other

def use(kind):
    if kind == "VariantClient":
        return client.variants(IMAGES, 0)
    loop = asyncio.new_event_loop()
    return loop, loop.run_until_complete(hold())

kept = use({parent!r})
sys.stdout.flush()
pid = os.fork()
if not pid:
    try:
        use({child!r})
    except UserError as error:
        print(str(error)[:29], flush=True)
        os._exit(0)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)  # the loop that holds the asynchronous client is not tidied up
"""
    assert run(tmp_path, server.address, body).splitlines() == ["gRPC does not survive fork: t", "0"]


def test_the_loop_of_a_forked_child_is_refused_unless_allowed(server, tmp_path):
    body = """
import os, asyncio
background.run(asyncio.sleep(0))
sys.stdout.flush()
child = os.fork()
if not child:
    assert background.was_forked_from_live()
    try:
        background.background_loop()
        os._exit(1)
    except UserError:
        pass
    tasks = background.Tasks(allow_fork=True)
    good = tasks.run(asyncio.sleep(0, 7), 10) == 7
    client.close()
    os._exit(0 if good else 2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), background.was_forked_from_live())
"""
    assert run(tmp_path, server.address, body) == "0 False"


def test_a_process_ends_quietly_with_a_call_under_way(tmp_path):
    body = """
future = client.submit(IMAGES, 0)
print("left")
"""
    assert run(tmp_path, f"unix:{tmp_path}/nobody.sock", body) == "left"
