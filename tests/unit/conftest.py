"""What unit tests share: a bucket on each of two real S3 servers, and a real tiny Llama."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import S3Server


@pytest.fixture
def moto_s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """moto, with a bucket named ``bucket``."""
    yield from _with_bucket(moto_server, monkeypatch)


@pytest.fixture
def rclone_s3(rclone_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """rclone, with a bucket named ``bucket``."""
    yield from _with_bucket(rclone_server, monkeypatch)


def _with_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    from ckptfuse.store.s3_client import client

    server.use(monkeypatch)
    names = [bucket["Name"] for bucket in client().list_buckets()["Buckets"]]
    if "bucket" not in names:
        client().create_bucket(Bucket="bucket")
    yield server
    client.cache_clear()


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of one tiny Llama with tied embeddings, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    paths = []
    for step in (100, 200, 300):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        path = folder / f"checkpoint-{step}"
        model.save_pretrained(path)
        paths.append(path)
    return paths
