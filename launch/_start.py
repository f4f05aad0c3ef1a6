"""What the scripts in this folder share: each starts the command of ``relora-mora`` that it names."""

try:
    from relora_mora.__main__ import start as start
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None
