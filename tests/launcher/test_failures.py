"""Which failures of a stage are worth another try."""

from __future__ import annotations

import pytest

from rlhf.launcher.failures import may_pass, tells

CONNECTION = "[rank0]: RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"


@pytest.mark.parametrize(
    ("code", "lines", "passes"),
    [
        (-9, [], True),
        (247, ["ValueError: said before it was killed"], True),
        (0, [], True),  # DeepSpeed's launcher, a part of which was killed
        (1, [CONNECTION], True),
        (
            1,
            ["node2: [rank3]: torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error"],
            True,
        ),
        (255, ["pdsh@node1: node2: ssh exited with exit code 255", "Connection to node2 closed by remote host."], True),
        (1, ["torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined."], True),
        (1, ["[rank1]: ValueError: a row", CONNECTION], False),
        (1, ["KeyError: 'x'"], False),
        (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."], False),
        (245, [], False),  # a segmentation fault
        (1, ["jinja2.exceptions.TemplateError: System role not supported"], False),
    ],
)
def test_killed_processes_and_lost_nodes_may_pass_and_exceptions_do_not(code: int, lines: list[str], passes: bool) -> None:
    assert may_pass(code, [line for line in lines if tells(line)]) is passes
