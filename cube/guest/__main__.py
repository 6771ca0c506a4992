"""`python -m cube.guest`: makes the guest's kernel and initramfs by hand (tools/guest-kernel)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from cube.guest.assets import default_cache, ensure_guest
from imagecache.errors import CubecacheError, exit_code


def main() -> int:
    """Prints where the files are; exit codes as in imagecache.errors."""
    parser = argparse.ArgumentParser(
        prog="tools/guest-kernel",
        description="Makes the kernel and initramfs that microVMs boot, from this distribution's "
        "packages (downloaded and unpacked, not installed). Needs no root.",
    )
    parser.add_argument("--cache-dir", type=Path, help="where the files are kept")
    parser.add_argument("--kernel", type=Path, help="a kernel of your own")
    parser.add_argument("--refresh", action="store_true", help="download again")
    parser.add_argument("--json", action="store_true", help="answer in JSON")
    arguments = parser.parse_args()
    cache = arguments.cache_dir or default_cache(os.environ)
    try:
        files = ensure_guest(cache, kernel=arguments.kernel, refresh=arguments.refresh)
    except CubecacheError as error:
        sys.stderr.write(f"tools/guest-kernel: {error}\n")
        return exit_code(error)
    answer = {
        "kernel": str(files.kernel),
        "initrd": str(files.initrd),
        "release": files.release,
        "kernel_bytes": files.kernel.stat().st_size,
        "initrd_bytes": files.initrd.stat().st_size,
    }
    if arguments.json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        sys.stdout.writelines(f"{name}: {value}\n" for name, value in answer.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
