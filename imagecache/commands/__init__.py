"""imagecache's commands: serving, names, checks. Each reads settings and prints, no more."""

from imagecache.commands.collecting import gc, pin
from imagecache.commands.completing import completion
from imagecache.commands.configuring import config
from imagecache.commands.doctor import doctor
from imagecache.commands.images import images, remove
from imagecache.commands.inspecting import diff, inspect
from imagecache.commands.repacking import repack
from imagecache.commands.repairing import repair, scrub, stats
from imagecache.commands.sealing import secrets
from imagecache.commands.serving import serve
from imagecache.commands.tokens import token
from imagecache.commands.verifying import verify

COMMANDS = (
    serve,
    config,
    token,
    images,
    inspect,
    diff,
    verify,
    remove,
    doctor,
    gc,
    pin,
    scrub,
    repair,
    stats,
    repack,
    secrets,
    completion,
)
