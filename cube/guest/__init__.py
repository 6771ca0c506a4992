"""Makes what a guest boots from: a kernel, its modules, and an initramfs with our agent as init.

Everything comes from the distribution's own packages, downloaded and unpacked, never installed, and
from the agent's source beside this package. It must not need root, and must not change the host.
State: one cache directory, owned by whoever calls `ensure_guest`, guarded by a lock file.
"""
