#!/bin/sh
# clang-tidy over our own C sources; see run_tidy.py. run_tidy.sh BUILD_DIR [PATH...]
exec python3 "$(dirname "$0")/run_tidy.py" "$@"
