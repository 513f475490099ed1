#!/bin/sh
# Pack the project for a GPU machine without network: the project's wheel, the wheels that such a machine lacks, and an
# install script that uses only this folder and replaces no installed package.
#
#     scripts/pack_offline.sh dist/offline
#     # copy the folder to the machine, then there:
#     offline/install.sh
#
# The machine has Python 3.12 with the packages of PROVIDED, such as torch 2.11 and transformers 5.17.
set -eu

# Dependencies of the project, and their dependencies, that the machine may lack. Versions: constraints.txt.
PACKED="
accelerate annotated-doc annotated-types anyio certifi charset-normalizer click diffusers filelock ftfy h11 idna
importlib-metadata Jinja2 lazy-importer markdown-it-py MarkupSafe mdurl omegaconf packaging peft psutil pydantic
pydantic-core Pygments PyYAML requests rich safetensors shellingham starlette torchao tqdm typer typing-extensions
typing-inspection urllib3 uvicorn wcwidth zipp
"
# Large packages, and those whose version belongs to torch and transformers. install.sh checks that they are there.
PROVIDED="torch transformers huggingface_hub numpy scipy matplotlib pyarrow pillow"

MAX_MEGABYTES=60
PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/pack_offline.sh DIRECTORY}
mkdir -p "$out/wheels"
rm -f "$out"/wheels/*.whl

"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" "$root"
# shellcheck disable=SC2086
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$out/wheels" --constraint "$root/constraints.txt" \
    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 $PACKED

cat >"$out/install.sh" <<INSTALL
#!/bin/sh
# Install flowgrain from this folder. No network is used, and no installed package is replaced.
set -eu
PYTHON=\${PYTHON:-python3}
here=\$(cd "\$(dirname "\$0")" && pwd)
for package in $PROVIDED; do
    "\$PYTHON" -m pip show --quiet "\$package" 2>/dev/null ||
        { echo "\$package is not installed. Install it, or use a machine that has it." >&2; exit 1; }
done
# Installed versions are constraints, so that pip reports a conflict instead of replacing a package.
"\$PYTHON" -m pip list --format=freeze --disable-pip-version-check | grep -i -v '^flowgrain=' >"\$here/installed.txt"
# Also if this version is installed: its code may be another.
"\$PYTHON" -m pip install --no-index --no-deps --force-reinstall "\$here"/wheels/flowgrain-*.whl
"\$PYTHON" -m pip install --no-index --find-links "\$here/wheels" --constraint "\$here/installed.txt" 'flowgrain[quantize]'
"\$PYTHON" -m flowgrain --version
INSTALL
chmod +x "$out/install.sh"

size=$(du -sm "$out" | cut -f1)
echo "$out: $(ls "$out/wheels" | wc -l) wheels, $size MB"
[ "$size" -le "$MAX_MEGABYTES" ] || { echo "more than $MAX_MEGABYTES MB" >&2; exit 1; }
