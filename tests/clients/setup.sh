#!/usr/bin/env bash
# Installs the clients of `pytest -m clients` into $MLX_FLASH_CLIENTS, by default tests/clients/.env.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${MLX_FLASH_CLIENTS:-$here/.env}
python=${PYTHON:-python3}
quiet="--no-audit --no-fund --loglevel=error"

echo "== JavaScript clients"
mkdir -p "$folder/more" "$folder/programs"
cp "$here"/more/{package.json,package-lock.json} "$folder/more"
(cd "$folder/more" && npm ci --ignore-scripts $quiet)

echo "== programs"
cp "$here/programs/package.json" "$folder/programs"
cd "$folder/programs"
npm install --no-package-lock --ignore-scripts $quiet
# The two programs whose packages put a binary into place after the installation.
(cd node_modules/@anthropic-ai/claude-code && node install.cjs)
(cd node_modules/opencode-ai && node postinstall.mjs)

for name in python aider; do
    echo "== $name.txt"
    [ -x "$folder/$name/bin/python" ] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -qq --disable-pip-version-check -r "$here/$name.txt"
done
