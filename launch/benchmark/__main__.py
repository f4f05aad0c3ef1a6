"""The benchmarks, one command: ``python -m launch.benchmark KIND ...``, from the root of the checkout."""

import importlib
import sys

from relora_mora.commands.pretrain import run_to_the_end
from relora_mora.system.process import many_imports

KINDS = ("steps", "layers")
USAGE = f"""usage: python -m launch.benchmark {" | ".join(KINDS)} ...    (KIND --help lists its arguments)

`steps` measures a job of several ranks if a launcher starts it (on CPUs put DS_ACCELERATOR=cpu in front):
  torchrun --nproc_per_node=2 -m launch.benchmark steps configs/model/llama_130m.json --zero_stage=2
  deepspeed --num_gpus=2 --module launch.benchmark steps configs/model/llama_130m.json --zero_stage=2"""


def main() -> None:
    """Runs one kind of benchmark and exits."""
    arguments = sys.argv[1:]
    # DeepSpeed's launcher puts its --local_rank before the kind
    kind = next((argument for argument in arguments if not argument.startswith("-")), None)
    if kind not in KINDS:
        asked = kind is None and {"-h", "--help"} & set(arguments)
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    arguments.remove(kind)
    with many_imports():
        module = importlib.import_module(f"launch.benchmark.{kind}")
    # an ordinary exit may abort one of several ranks after its work is done
    run_to_the_end(module.main, arguments, name=f"python -m launch.benchmark {kind}")


if __name__ == "__main__":
    main()
