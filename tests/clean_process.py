"""Scripts in processes of their own, without the type checks of the tests.

Importing torch and what the package first needs of it takes seconds. So one process imports it, and each script runs in
a fork of that process. Tests that use it are in one group, so that they share it under ``--dist loadgroup``.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

in_one_group = pytest.mark.xdist_group("clean process")

# Imports first, then forks for each line that it reads. A script ends as any process: with exit handlers and its code.
SERVER = """
import gc, json, os, resource, sys, tempfile, traceback
import torch, zarr
import adaptive_tangents as at

torch.set_num_threads(1)
with torch.random.fork_rng(devices=[]):
    model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
    at.tangent_features(model, x).kernel()
    before_a_module = ("torch._dynamo" in sys.modules, hasattr(at.TangentModule.forward, "_torchdynamo_disable"))
    at.TangentModule(model, at.Fixed())(x)
    with tempfile.TemporaryDirectory() as folder:
        at.kernel_to_store(model, x, folder + "/K", outputs="trace")
gc.collect()
gc.freeze()  # what is imported stays: a script that looks for garbage looks among its own


def become(script, arguments, env, stack, files):
    for target, file in zip((1, 2), files):
        os.dup2(file.fileno(), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    if stack is not None:
        resource.setrlimit(resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    sys.argv = ["-c", *arguments]
    space = {"__name__": "__main__", "before_a_module": before_a_module}
    exec(compile(script, "<string>", "exec"), space)


for line in iter(sys.stdin.readline, ""):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            become(*json.loads(line), (out, err))
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    # Each thread's own arena would use address space, which a limit of a process counts, but no memory.
    alone = os.environ | {"MALLOC_ARENA_MAX": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)
    atexit.register(server.communicate)  # it ends with its input
    return server


def run(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, stack: int | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``python -c script``, with more variables or a smaller stack (bytes) if given; it reads nothing."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([script, arguments, dict(env or {}), stack]) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess([sys.executable, "-c", script], *json.loads(server.stdout.readline()))
