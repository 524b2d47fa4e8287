"""Distributed checkpoints as trainers write them: torch's own, by several processes (gloo).

``launch`` runs commands such as write,KIND,SEED,FOLDER or resume,KIND,FOLDER,OUT on every rank.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from infra.native.postgres import free_port
from tests.forked import run_forked

ROOT = Path(__file__).parents[1]


def launch(ranks: int, *commands: Sequence[object]) -> None:
    """Run these commands, one after the other, on ``ranks`` processes; raises when one fails."""
    words = [",".join(map(str, command)) for command in commands]
    surroundings = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = run_forked("tests.distributed:main", words, ROOT, surroundings)
    assert done.returncode == 0, done.stderr[-3000:]


class MasterSGD(torch.optim.Optimizer):
    """bf16 weights with fp32 copies in the optimizer's state, as Megatron and apex keep them."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weights in group["params"]:
                state = self.state[weights]
                if "master_param" not in state:
                    state["master_param"] = weights.detach().float().clone()
                    state["exp_avg"] = torch.zeros_like(state["master_param"])
                if weights.grad is not None:
                    state["exp_avg"].mul_(0.9).add_(weights.grad.float())
                    state["master_param"].sub_(group["lr"] * state["exp_avg"])
                weights.copy_(state["master_param"].to(weights.dtype))


def build(kind: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 6), torch.nn.Linear(6, 7), torch.nn.BatchNorm1d(7)
    )
    if kind == "masters":
        model = model.bfloat16()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if kind == "masters":
        return model, MasterSGD(model.parameters(), lr=0.1)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Steps that move every parameter and leave state in the optimizer."""
    for _ in range(2):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.ones_like(parameter) * (number + 1) * 0.1
        optimizer.step()


def write(kind: str, seed: str, folder: str) -> None:
    model, optimizer = build(kind, int(seed))
    train(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    step = torch.tensor(int(seed))
    dcp.save(
        {"model": weights, "optim": state, "train_state": {"step": step, "seen": [1, 2]}},
        checkpoint_id=folder,
    )


def resume(kind: str, folder: str, out: str) -> None:
    """Load as a trainer does, take one step of nothing, and save whole weights from rank 0."""
    model, optimizer = build(kind, 99)
    train(model, optimizer)  # so that the optimizer has state to load into
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    training = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    if dist.get_rank() == 0:
        torch.save(training, out)


def write_columns(seed: str, axis: str, folder: str) -> None:
    """One matrix and a stack of matrices, cut along an axis; and a bf16 one that is whole."""
    generator = torch.Generator().manual_seed(int(seed))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {
        "matrix": torch.randn(9, 10, generator=generator),
        "stack": torch.randn(4, 6, 8, generator=generator).bfloat16(),
        "count": torch.tensor(int(seed)),
    }
    cut = {
        name: distribute_tensor(whole[name], mesh, [Shard(int(axis))])
        for name in ("matrix", "stack")
    }
    dcp.save({**whole, **cut}, checkpoint_id=folder)


def main() -> None:
    """Become one process a rank."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run, args=(n,)) for n in range(int(os.environ["WORLD_SIZE"]))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


def _run(rank: int) -> None:
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    for command in sys.argv[1:]:
        name, *rest = command.split(",")
        {"write": write, "resume": resume, "columns": write_columns}[name](*rest)
    dist.barrier()
    dist.destroy_process_group()
