"""A PostgreSQL server of its own for the tests, from the system's packages: in a temporary folder, on a free port."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def binaries():
    """The folder of the newest server's programs, None where there is none."""
    found = shutil.which("pg_ctl")
    folders = glob.glob("/usr/lib/postgresql/*/bin") + ([str(Path(found).parent)] if found else [])
    return max(folders, default=None, key=lambda folder: (len(folder), folder))


def why_not():
    """Why there is no server to test with; None if there is one."""
    if binaries() is None:
        return "no PostgreSQL server on this machine (apt-get install postgresql)"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "PostgreSQL does not run as root, and there is no runuser to run it as another user"
    return None


class PostgresServer:
    """Running while its `with` block runs; may be stopped, killed and started again in it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="copa-postgres-", dir="/tmp"))
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self._as = []
        if os.geteuid() == 0:
            user = "postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody"
            shutil.chown(self.folder, user)
            self._as = ["runuser", "-u", user, "--"]
        self._run("initdb", "-A", "trust", "-U", "copa", "--no-instructions")

    def _run(self, program, *arguments):
        command = [*self._as, f"{binaries()}/{program}", "-D", str(self.folder / "data"), *arguments]
        done = subprocess.run(command, cwd="/tmp", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 0, done.stderr.decode()

    @property
    def pid(self):
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def start(self):
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c max_connections=60"
        for last in [*[False] * 50, True]:  # what is left of a killed one is in the way for a moment
            try:
                return self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")
            except AssertionError:
                if last:
                    raise
                time.sleep(0.1)

    def stop(self, mode="fast"):
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def kill(self):
        """As a machine that loses its power: no process of the server is asked."""
        pid = self.pid
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
        for one in [pid, *map(int, children.stdout.split())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def database(self, name):
        """The address of an empty database of this name."""
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.sql(f"CREATE DATABASE {name}")
        return f"postgresql://copa@127.0.0.1:{self.port}/{name}"

    def sql(self, statement, *, name="postgres"):
        import psycopg

        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=copa dbname={name}", autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        with contextlib.suppress(AssertionError, OSError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)
