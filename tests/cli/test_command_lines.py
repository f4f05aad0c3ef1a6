"""The command lines that users type: exit code, and what the answer names. Nothing starts, nothing is left behind."""

import contextlib
import io
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

from relora_mora.__main__ import main
from relora_mora.commands import NAMES
from tests.tools.commands import Answer, call, left_in, refused
from tests.tools.each import each


@each(
    "line,named",
    [
        # commands and settings by name, with near misses
        ("pretrian tiny_mora", "did you mean pretrain?"),
        ("nonsense", "the commands are demo, pretrain,"),
        ("pretrain", "missing argument: config"),
        ("pretrain tiny_remoar", "did you mean tiny_remora?"),
        ("pretrain none.yaml", "none.yaml"),
        (
            "pretrain llama_7b",
            "it is a model and has no other settings; give those of a run",
        ),
        ("pretrain tiny_mora --train.stepss=3", "train.stepss: unknown; did you mean steps?"),
        ("pretrain tiny_mora --trian.steps=3", "trian: unknown; did you mean train?"),
        ("pretrain tiny_mora --output_dir=x", "--output_dir: unknown; did you mean --train.run_dir?"),
        ("pretrain tiny_mora --stepss=3", "--stepss: unknown; did you mean --train.steps?"),
        ("pretrain tiny_mora --method.name=moar", "method.name: got 'moar'"),
        ("pretrain tiny_mora --method.name=sltrain", "method.name: only release 0.2"),
        ("pretrain tiny_mora --train.steps=0 --optim.lr=x --method.rnk=3", "3 faults in tiny_mora"),
        ("pretrain tiny_mora --train.steps=0 --stepss=3 --show=0 stray", "4 faults in tiny_mora and the command line"),
        ("evaluate m --data=d --data.sequence_length=1 --limt=3 --data.lanes=2", "3 faults in the command line"),
        ("pretrain none.yaml --stepss=3", "2 faults in none.yaml and the command line"),
        ("pretrain tiny_mora --train.steps=[", "--train.steps=[: not YAML"),
        ("finetune tiny_mora --method.rank=-1", "method.rank: got -1"),
        ("finetune tiny_mora", "model.init_from: missing"),
        ("plan tiny_mora --jsn", "--jsn: unknown; did you mean --json?"),
        ("train-tokenizer --data=d --out=o --vocab-sise=3", "--vocab_sise: unknown; did you mean --vocab_size?"),
        ("compare a --bst=optim.lr", "--bst: unknown; did you mean --best?"),
        # flags given twice, without a value, or with the value of another
        ("pretrain tiny_mora --train.steps=3 --train.steps=4", "--train.steps: given twice"),
        ("export c o --dtype=bfloat16 --dtype=float32", "--dtype: given twice"),
        ("evaluate m --data=d --max-tokens=3 --max_tokens=4", "--max_tokens: given twice"),
        ("evaluate m --data=d --a.b.my-set=3", "--a.b.my-set: names with '-'"),
        ("evaluate m --data", "--data: has no value"),
        ("evaluate m --data --tokens=3", "--data: has no value"),
        ("evaluate m --data --tokns=3", "--tokns: unknown; did you mean --max_tokens?"),
        ("evaluate --data=d", "model"),
        ("evaluate m stray --data=d", "stray"),
        ("evaluate m --data=d - x", "-: unexpected argument"),
        ("evaluate m --data=d -- --interactive", "--: unexpected argument"),
        ("plan --json c.yaml --gpus_per_node=0", "--gpus_per_node: got 0"),  # c.yaml is not the value of --json
        ("pretrain tiny_mora stray", "unknown argument: stray"),
        # values
        ("evaluate m --data=", "--data: empty"),
        ("evaluate '' --data=d", "--model: empty"),
        ("evaluate m --data='{c4: a, books: [}'", "--data: not YAML"),
        ("evaluate m --data='{c4: {sourc: a}}'", "data.validation.c4: "),
        ("evaluate m --data='[{source: a, splitt: b}]'", "data.validation.0.splitt: unknown"),
        ("evaluate m --data=\udcff", "not UTF-8"),
        ("evaluate m --data=d --data.sequence_length=1", "data.sequence_length: got 1"),
        ("evaluate m --data=d --max_tokens=0", "--max_tokens: got 0"),
        ("evaluate m --data=d --micro_batch_size=-1", "--micro_batch_size: got -1"),
        ("evaluate m --data=d --precision=int8", "--precision: got 'int8'"),
        ("export c o --dtype=int8", "--dtype: got 'int8'"),
        ("plan tiny_mora --tokens_per_second=.inf", "--tokens_per_second: got inf"),
        ("plan tiny_mora --utilization=0", "--utilization: got 0"),
        ("plan tiny_mora --device=tpu", "--device: got 'tpu', expected cuda, cpu or one of a100, a100-40gb"),
        ("plan tiny_mora --link_gbits=-1", "--link_gbits: got -1"),
        ("train-tokenizer --data=d", "out"),
        ("train-tokenizer --data=d --out=o --vocab_size=259", "--vocab_size: got 259"),
        ("train-tokenizer --data=d --out=o --vocab_size=1000000000000", "--vocab_size"),
        ("train-tokenizer --data=d --out=o --max_bytes=0", "--max_bytes: got 0"),
        ("train-tokenizer --data=d --out=o --max_documents=-1", "--max_documents: got -1"),
        ("train-tokenizer --data=d --out=o --character_coverage=.nan", "--character_coverage: got nan"),
        ("train-tokenizer --data=d --out=o --data.max_bad_fraction=7", "data.max_bad_fraction: got 7"),
        ("train-tokenizer --data='[{source: a}, {source: b, weight: 9}]' --out=o", "without weights"),
        # commands that need something which is not there
        ("compare", "no runs given"),
        ("compare none", "none: not found"),
        ("study none.yaml", "No such file"),
        ("study smoke --jobs=0", "--jobs: got 0"),
        ("spectrum", "no runs given"),
        ("spectrum none", "none: not found; give a run folder"),
        ("spectrum none --above=-1", "--above: got -1"),
        ("board none", "none: no run"),
        ("configs none", "got none"),
        ("completion fsh", "fsh"),
        ("demo --stps=3", "--stps: unknown; did you mean --train.steps?"),
    ],
)
def test_refused(line: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(_answer(line), named)
    assert left_in(tmp_path) == []


@each(
    "line,shown",
    [
        ("--help", "Usage: relora-mora COMMAND"),
        ("--version", "relora-mora "),
        ("pretrain --help", "CONFIG"),
        ("--local_rank=1 plan --help", "Usage: relora-mora plan CONFIG"),  # as DeepSpeed's launcher gives it
        ("compare none -h", "--against"),
        ("configs", "tiny_remora"),
        ("completion", "bash completion"),
    ],
)
def test_answered(line: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = _answer(line)
    assert (answer.code, answer.err) == (0, "")
    assert shown in answer.out


def _answer(line: str) -> Answer:
    command, *words = shlex.split(line)
    if command in NAMES:
        return call(command, *words)
    out, err = io.StringIO(), io.StringIO()
    stays = mock.patch("relora_mora.supervise.exits.leave_now", sys.exit)
    with stays, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([command, *words])
    return Answer(int(end.value.code or 0), out.getvalue(), err.getvalue())
