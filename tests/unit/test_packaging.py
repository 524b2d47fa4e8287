"""Models and tokenizers that are Python beside their configuration, as consumers get them."""

import json
import shutil
from pathlib import Path

import pytest

from ckptfuse.errors import CorpusError
from ckptfuse.merge.once import merge_once
from ckptfuse.own_code import tokenizer_class
from ckptfuse.store import FolderStore
from ckptfuse.tokenizing import load_tokenizer, tokenizer_files_digest
from tasks.packaging import package

#: A Llama and a tokenizer of another name, whose ids are the places of bytes in a file.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

Path(__file__).with_name("was_run").touch()

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.tiktoken"}

    def __init__(self, vocab_file, **options):
        self.letters = Path(vocab_file).read_text()
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)}

    def _tokenize(self, text):
        return [letter for letter in text if letter in self.letters]

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index] if index < len(self.letters) else ""

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
"""
LETTERS = " abcdefghijklmnopqrstuvwxyzO."


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies code that it runs."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    return folder


@pytest.fixture
def own(llamas: list[Path], tmp_path: Path) -> list[Path]:
    """Two of the Llamas, of an architecture and with a tokenizer that only their code knows."""
    paths = []
    for llama in llamas[:2]:
        path = tmp_path / llama.name
        shutil.copytree(llama, path)
        about = json.loads((path / "config.json").read_text())
        about |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
        about["auto_map"] = {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        }
        (path / "config.json").write_text(json.dumps(about))
        tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}}
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (path / "own.tiktoken").write_text(LETTERS)
        (path / "modeling_own.py").write_text(CODE)
        paths.append(path)
    return paths


@pytest.mark.parametrize("damaged", [b"", b'{"auto_', b"[]", b'{"auto_map": null}', b"{}"])
def test_a_damaged_configuration_names_no_code(damaged: bytes) -> None:
    assert tokenizer_class({"tokenizer_config.json": damaged}) is None
    named = b'{"auto_map": {"AutoTokenizer": "own.Own"}}'
    assert tokenizer_class({"tokenizer_config.json": damaged, "config.json": named}) == "own.Own"


def test_what_has_code_of_its_own_is_packaged_unrun_and_loads_where_it_is_trusted(
    own: list[Path], modules: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow.transformers

    model = tmp_path / "merged"
    merge_once(str(model), [str(path) for path in own], [0.5, 0.5])
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    package(model, tmp_path / "packaged")
    assert "[y/N]" not in capfd.readouterr().out
    assert not list(modules.rglob("was_run"))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    packaged = tmp_path / "packaged" / "model"
    assert {path.name: path.read_bytes() for path in packaged.iterdir()} == before
    assert (packaged / "model.safetensors").samefile(model / "model.safetensors")

    loaded = mlflow.transformers.load_model(str(tmp_path / "packaged"))
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert type(loaded.tokenizer).__name__ == "OwnTokenizer"
    assert loaded.tokenizer("a cab").input_ids == [LETTERS.index(letter) for letter in "a cab"]
    (answer,) = loaded(["a cab"], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"].startswith("a cab")


def test_a_tokenizers_own_code_is_part_of_it_and_runs_where_it_is_trusted(
    own: list[Path], modules: Path
) -> None:
    store = FolderStore(own[0])
    with pytest.raises(CorpusError, match="trust_remote_code"):
        load_tokenizer(store)
    assert not list(modules.rglob("was_run"))
    ids, offsets, _ = load_tokenizer(store, trust_remote_code=True).encode("a cab")
    assert ids == [LETTERS.index(letter) for letter in "a cab"]
    assert offsets is None
    for name in ("own.tiktoken", "modeling_own.py"):
        before = tokenizer_files_digest(store)
        (own[0] / name).write_text((own[0] / name).read_text() + "\n")
        assert tokenizer_files_digest(store) != before, name
