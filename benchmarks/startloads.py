"""The programs whose starts are measured: what is run, in which image, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass

from imagemaker.layout import Settings
from imagemaker.recipes import RECIPES

LARGE = "large"
READY = b"hello"

_NGINX = """
printf 'daemon off; error_log stderr; pid /tmp/p; events{} http{ access_log off;
client_body_temp_path /tmp/b; proxy_temp_path /tmp/c; fastcgi_temp_path /tmp/d;
uwsgi_temp_path /tmp/e; scgi_temp_path /tmp/f;
server{ listen 127.0.0.1:8080; root /var/www/html; } }' >/tmp/n.conf
/usr/sbin/nginx -c /tmp/n.conf & while ! exec 3<>/dev/tcp/127.0.0.1/8080; do :; done 2>/dev/null
printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; read -r line <&3; echo "hello $line"; kill %1
"""
_POSTGRES = """
chmod 1777 /tmp; cd /tmp; export B=$(echo /usr/lib/postgresql/*/bin)
cat >/tmp/go <<'END'
$B/initdb -D /tmp/d --no-sync >/dev/null
$B/pg_ctl -D /tmp/d -w -o '-k /tmp -h ""' start >/dev/null
echo hello $($B/psql -h /tmp -Atc 'select version()' postgres)
$B/pg_ctl -D /tmp/d -m immediate stop >/dev/null
END
setpriv --reuid=postgres --regid=postgres --clear-groups bash /tmp/go
"""
_REDIS = """
redis-server --port 0 --unixsocket /tmp/s --save '' --dir /tmp >/dev/null &
while ! redis-cli -s /tmp/s ping >/dev/null 2>&1; do :; done
echo hello $(redis-cli -s /tmp/s ping); kill %1
"""


@dataclass(frozen=True)
class Load:
    """What is started and what it reads: `reads` says it for the table's reader."""

    image: str
    command: tuple[str, ...]
    reads: str
    previous: str | None = None  # a recipe of its own for the version before
    added: str | None = "less"  # else: the package that this version has more than the one before


LOADS = (
    Load("python-numpy", ("python3", "/app/main.py"), "interpreter, numpy and its libraries",
         previous="python-numpy", added=None),
    Load("nginx", ("bash", "-c", _NGINX), "nginx, its modules, bash, one page"),
    Load("postgresql", ("bash", "-c", _POSTGRES), "initdb, server, psql"),
    Load("nodejs", ("nodejs", "/app/main.js"), "node and its libraries"),
    Load("openjdk", ("java", "-version"), "libjvm, the modules file"),
    Load("torch-cpu", ("python3", "/app/main.py"), "torch's libraries: most of the image"),
    Load("redis", ("bash", "-c", _REDIS), "server, client, bash"),
    Load("ruby", ("ruby", "-rset", "-rjson", "-e", "puts 'hello from ruby'"), "ruby, libraries"),
    Load("large", ("python3", "/app/main.py"), "numpy, 64 MB here and there of 5 GB of weights",
         added=None),
    Load("static-busybox", ("/bin/busybox", "sh", "/hello.sh"), "one static binary", added=None),
)  # fmt: skip


def settings_of(image: str) -> Settings:
    """How an image's recipe runs it; the large one is python-numpy's with more below."""
    return RECIPES["python-numpy" if image == LARGE else image].settings


def says_ready(load: Load, line: bytes) -> bool:
    """Whether a line of output is the ready line."""
    return READY in line or (load.image == "openjdk" and b"build" in line)
