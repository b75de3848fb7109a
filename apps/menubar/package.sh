#!/usr/bin/env bash
# Packages the menu bar app as a macOS app, with briefcase. NOT TESTED: it is developed on a machine that is not a Mac.
#
#   apps/menubar/package.sh [OUTPUT_FOLDER]      on a Mac with Apple silicon, Xcode's command line tools, Python >= 3.11
#
# The app is signed ad hoc, for the machine it is built on. `briefcase package -i IDENTITY` signs it for other machines.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(uname -sm)" = "Darwin arm64" ] || { echo "package.sh: needs a Mac with Apple silicon" >&2; exit 2; }
output=${1:-build/menubar}
mkdir -p "$output/src/mlx_flash_menubar"
output=$(cd "$output" && pwd)

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

python3 -m venv "$output/venv"
"$output/venv/bin/pip" install --quiet "briefcase>=0.4.7,<0.5"

# The runtime is included as a wheel, because its C reader must be built for this machine.
ARCHFLAGS="-arch arm64" MACOSX_DEPLOYMENT_TARGET=14.0 _PYTHON_HOST_PLATFORM=macosx-14.0-arm64 \
    "$output/venv/bin/pip" wheel . --no-deps --wheel-dir "$output"
wheel=$(ls -t "$output"/mlx_flash_runtime-*.whl | head -1)

# briefcase starts the module named as the app.
echo "from mlx_flash.apps.menubar.__main__ import main; main()" >"$output/src/mlx_flash_menubar/__main__.py"
touch "$output/src/mlx_flash_menubar/__init__.py"
cp LICENSE "$output/"

cat >"$output/pyproject.toml" <<TOML
[tool.briefcase]
project_name = "mlx_flash"
bundle = "io.github.mlx-flash"
version = "$version"
license.file = "LICENSE"

[tool.briefcase.app.mlx_flash_menubar]
formal_name = "mlx_flash"
description = "Language models bigger than memory, in the menu bar"
sources = ["src/mlx_flash_menubar"]
requires = ["mlx-flash-runtime[app] @ file://$wheel"]

[tool.briefcase.app.mlx_flash_menubar.macOS]
universal_build = false            # MLX has wheels only for arm64
min_os_version = "14.0"
info.LSUIElement = true            # only in the menu bar: no icon in the Dock, no menus at the left
TOML

cd "$output"
"$output/venv/bin/briefcase" create macOS app --no-input
"$output/venv/bin/briefcase" build macOS app --no-input

# MLX looks for its kernels beside its library; an app without them starts and fails at the first operation.
app=$(find "$output/build" -name '*.app' -maxdepth 4 | head -1)
[ -n "$(find "$app" -name mlx.metallib)" ] || { echo "package.sh: $app lacks mlx.metallib" >&2; exit 1; }

# The engine is the app itself, started with -m, so check that it can run a module.
binary="$app/Contents/MacOS/$(basename "$app" .app)"
"$binary" -m mlx_flash.generate --prompt "It was a dark night, and" --max-tokens 8
echo "made $app"
