"""Fine-tuning by configuration, through TRL's SFTTrainer: full and LoRA, on a model and conversations on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hf_shampoo4 as s4
from hf_shampoo4.cli import main
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training.arguments import ChatArguments
from hf_shampoo4.training.config import config_root
from hf_shampoo4.training.finetune import load_examples, parse, run
from hf_shampoo4.training.pretrain import TokenizerBeside
from tests.support.tiny import chat_model, conversations, often

CONFIGS = sorted((config_root() / "finetune").glob("*.yaml"), key=lambda path: path.stem)
SETTINGS = {
    "optim": "shampoo4bit", "optim_args": "algorithm=shampoo,stats_every=2,roots_every=2",
    "learning_rate": 1e-2, "max_steps": 4,
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "bf16": False, "max_length": 48,
    "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "assistant_only_loss": True,
    "validation_fraction": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("data") / "chat.jsonl")


def settings(model: Path, data: Path, folder: Path, **changes: object) -> dict[str, object]:
    paths = {"model_name_or_path": str(model), "dataset": str(data), "output_dir": str(folder)}
    return {**SETTINGS, **paths, **changes}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses(path: Path) -> None:
    config = parse(path.stem)
    assert config.training.optim == "shampoo4bit"
    assert config.training.output_dir == f"runs/finetune_{path.stem}"
    assert config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps == 64
    assert config.model.use_peft == (path.stem != "full")


def test_full_fine_tuning_and_its_resume_are_one_run(model: Path, data: Path, tmp_path: Path) -> None:
    whole = run(parse(settings(model, data, tmp_path / "a")))
    assert isinstance(whole.trainer.optimizer.optimizer, s4.Shampoo4bit)
    losses = [entry["loss"] for entry in whole.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert whole.metrics["perplexity"] > 1
    callbacks = whole.trainer.callback_handler.callbacks  # sharded checkpoints get their tokenizer by this one
    assert [type(callback) for callback in callbacks].count(TokenizerBeside) == 1
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = run(parse(settings(model, data, tmp_path / "b"), ["--resume_from_checkpoint", "auto"]))
    assert [entry["loss"] for entry in resumed.trainer.state.log_history if "loss" in entry] == losses


def test_lora_by_the_command(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.json"  # YAML is a superset of JSON
    given = settings(model, data, tmp_path / "run", use_peft=True, lora_r=4, lora_target_modules="all-linear")
    config.write_text(json.dumps(given))
    assert main(["finetune", str(config), "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "4x32" in capsys.readouterr().out  # the table of what is preconditioned
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_optimizer_state_mb"] > 0


@pytest.mark.parametrize("optim", ["shampoo4bit", "soap4bit", "kl_shampoo4bit"])
def test_qlora_and_its_resume(model: Path, data: Path, tmp_path: Path, optim: str) -> None:
    """On a base model in 4 bits (bitsandbytes' nf4, on a CPU), with gradient checkpointing and accumulation."""
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' AVX-512 path of evaluation needs matrices of at least 64 columns, the tiny model has 32
    adapter = {
        "validation_fraction": 0.0,
        "load_in_4bit": True,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
    }
    chosen = {"optim": optim, "optim_args": often(optim), "dtype": "bfloat16", "gradient_checkpointing": True}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True}
    whole = run(parse(settings(model, data, tmp_path / "a", **adapter, **chosen)))
    kinds = {type(module).__name__ for module in whole.trainer.model.modules()}
    assert "Linear4bit" in kinds
    trained = [name for name, p in whole.trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    losses = [entry["loss"] for entry in whole.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    the_same = settings(model, data, tmp_path / "b", **adapter, **chosen)
    resumed = run(parse(the_same, ["--resume_from_checkpoint", "auto"]))
    again = [entry["loss"] for entry in resumed.trainer.state.log_history if "loss" in entry]
    assert again == pytest.approx(losses, rel=1e-3)  # TRL makes the adapter bfloat16, PEFT reads it back as float32
    assert resumed.trainer.optimizer.optimizer.param_groups[0]["step"] == 4


def test_examples_without_a_known_column_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(ConfigError, match=r"columns question, answer; it needs messages, or prompt and completion"):
        load_examples(ChatArguments(dataset=str(path)))


def test_tools_stay_beside_the_messages_and_pictures_are_refused(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "!"}] for i in range(30)]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps({"messages": m, "tools": "[]", "id": i}) + "\n" for i, m in enumerate(messages)))
    assert load_examples(ChatArguments(dataset=str(path)))[0].column_names == ["messages", "tools"]
    path.write_text("".join(json.dumps({"messages": m, "image": "a.png"}) + "\n" for m in messages))
    with pytest.raises(ConfigError, match=r"has pictures \(column 'image'\)"):
        load_examples(ChatArguments(dataset=str(path)))


def test_text_for_pretraining_is_no_example() -> None:
    with pytest.raises(ConfigError, match="'stdlib' is text for pretraining; allowed: a file, glob or folder"):
        load_examples(ChatArguments(dataset="stdlib"))


def test_examples_held_out_are_no_training_examples(data: Path) -> None:
    train, held_out = load_examples(ChatArguments(dataset=str(data), validation_fraction=0.25))
    texts = [{row["messages"][0]["content"] for row in part} for part in (train, held_out)]
    assert [len(t) for t in texts] == [18, 6]
    assert not texts[0] & texts[1]
    train, held_out = load_examples(ChatArguments(str(data), validation_fraction=0.0, max_train_examples=5))
    assert (len(train), held_out) == (5, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is required"),
        ({"lora_rank": 3}, "unknown setting 'lora_rank': did you mean"),
        ({"validation_fraction": 1}, "validation_fraction=1.0 is not allowed"),
        ({"optim_args": "blocks=3"}, "unknown option 'blocks'"),
        ({"dataset": None}, "required: --dataset"),
    ],
)
def test_errors_come_before_anything_is_loaded(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse(settings(tmp_path, tmp_path, tmp_path, **changes))


def test_a_model_that_is_not_there(data: Path, tmp_path: Path) -> None:
    config = parse(settings(tmp_path / "nowhere", data, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"model_name_or_path '.*nowhere' cannot be loaded"):
        run(config)


def test_what_is_held_out_is_not_learnt_from_where_examples_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i % 20}?", "completion": f"{i % 20}"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load_examples(ChatArguments(dataset=str(tmp_path / "a.jsonl"), validation_fraction=0.1))
    assert held_out is not None
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert len(train) == 5 * (20 - len(set(held_out["prompt"])))
    assert f"examples: {90 - len(train)} equal ones that are held out, and are left out" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text((json.dumps(rows[0]) + "\n") * 10)
    with pytest.raises(ConfigError, match="all examples equal ones that are held out: give others"):
        load_examples(ChatArguments(dataset=str(tmp_path / "a.jsonl")))


def test_a_split_that_files_do_not_have_is_held_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = load_examples(ChatArguments(dataset=str(data), validation_split="test"))
    assert held_out is not None
    assert not {str(row) for row in train} & {str(row) for row in held_out}
    assert f"examples: {len(train)} to train on, {len(held_out)} held out" in capsys.readouterr().out


def test_whole_texts_are_learnt_where_there_are_no_answers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {i} and word {i + 1}"}) + "\n" for i in range(24)))
    run(parse(settings(model, path, tmp_path / "out", max_steps=1)))
    assert "learning from the whole texts (assistant_only_loss=false)" in capsys.readouterr().out


def chats(path: Path, questions: list[str], answer: bool = True) -> Path:
    turns = [[{"role": "user", "content": question}] for question in questions]
    for messages in turns if answer else ():
        messages.append({"role": "assistant", "content": "word"})
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def test_examples_without_an_answer_within_max_length_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = [f"word {i}" for i in range(9)], [f"word {i} " * 90 for i in range(6)]
    mixed = chats(tmp_path / "mixed.jsonl", short + long)
    some = {"max_length": 64, "max_steps": 1}
    run(parse(settings(model, mixed, tmp_path / "out", validation_fraction=0, **some)))
    assert "examples: 6 of 15 to train on have nothing to learn within max_length=64" in capsys.readouterr().out
    none = chats(tmp_path / "none.jsonl", long)
    with pytest.raises(ConfigError, match="none of 6 examples to train on has anything to learn within max_length=64"):
        run(parse(settings(model, none, tmp_path / "none", validation_fraction=0, **some)))
    held_out = {"dataset": str(chats(tmp_path / "short.jsonl", short)), "validation_dataset": str(none)}
    with pytest.raises(ConfigError, match="none of 6 examples to validate on has anything to learn"):
        run(parse({**settings(model, none, tmp_path / "held", **some), **held_out}))


def test_errors_of_examples_and_layers_are_told_in_a_line(model: Path, data: Path, tmp_path: Path) -> None:
    lora = {"use_peft": True, "lora_target_modules": ["nosuch"]}
    with pytest.raises(ConfigError, match=r"lora_target_modules names no layer of .*nosuch"):
        run(parse(settings(model, data, tmp_path / "lora", **lora)))
    unanswered = chats(tmp_path / "unanswered.jsonl", [f"word {i}" for i in range(9)], answer=False)
    with pytest.raises(ConfigError, match="a conversation has no turn of the assistant"):
        run(parse(settings(model, unanswered, tmp_path / "unanswered")))


def test_a_template_that_marks_no_answers_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"cannot be trained with .*set assistant_only_loss=false"):
        run(parse(settings(folder, data, tmp_path / "out")))


def test_numbers_and_empty_cells_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{i}+{i}?,{2 * i}\n" for i in range(1, 20))
    (tmp_path / "sums.csv").write_text(f"prompt,completion\n{rows}20+20?,\n")
    train, held_out = load_examples(ChatArguments(dataset=str(tmp_path / "sums.csv")))
    assert held_out is not None
    assert {type(row["completion"]) for row in [*train, *held_out]} == {str}
    assert len(train) + len(held_out) == 19
    assert "1 of 20 rows have no prompt or completion and are left out" in capsys.readouterr().out


def test_a_row_that_is_not_utf8_is_told_in_one_line(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data.read_bytes().replace(b'"content": "', b'"content": "caf\xe9', 1))
    with pytest.raises(ConfigError, match=r"bad.jsonl': a text in it is not UTF-8, near b'caf.xe9"):
        load_examples(ChatArguments(dataset=str(path)))


def test_a_model_without_a_chat_template_is_told_so(model: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    tokenizer = json.loads((bare / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for alone in (True, False):
        with pytest.raises(ConfigError, match=r"has no chat template.*chat_template_path .*`prompt` and `completion`"):
            run(parse(settings(bare, data, tmp_path / f"out{alone}", assistant_only_loss=alone)))
