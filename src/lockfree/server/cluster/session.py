"""Ray in this process: started, joined, or found running, and left as it was found."""

import atexit
import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lockfree.server.cluster.actors import one_line

_PATIENCE = 5.0  # seconds for an address to answer


def find_ray() -> Any:
    """Returns the package ray.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("the engine Ray needs the package ray: pip install 'lockfree[cluster]'") from error
    return ray


@contextlib.contextmanager
def session(address: str | None, cpus: int) -> Iterator[None]:
    """Has Ray running meanwhile. What was not running before is not running afterwards, whatever happens.

    Args:
        address: A cluster to join, as in 10.0.0.1:6379; ``None``: one is started in this machine, which only this user can reach. If
            this process has joined a cluster already, that is used, and left as it is.
        cpus: How many processors a cluster that is started says it has.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
        ValueError: If this process has joined another one.
    """
    ray = find_ray()
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", there):
            raise ValueError(f"this process is part of the cluster at {there}: call ray.shutdown() before you join {address}")
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(ray))
        if address is not None:
            _knock(address)
            stack.callback(ray.shutdown)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConnectionError(f"the cluster at {address} does not let us in: {one_line(error)}") from error
        else:
            stack.enter_context(_alone())
            folder = stack.enter_context(_short_folder())
            stack.callback(ray.shutdown)
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
        yield


def _knock(address: str) -> None:
    """Finds out at once whether anybody listens at an address; Ray itself would try for a minute.

    Raises:
        ConnectionError: If nobody does.
        ValueError: If it is no address.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(f"address={address!r}: give host and port of a cluster's head node, as in 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise ConnectionError(
            f"no cluster answers at {address} within {_PATIENCE:g} s ({error.strerror or error}): start one with `ray start --head`"
        ) from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Has a cluster started that can be reached from this machine only, by who has the token, and reports to nobody."""
    from ray._private import ray_constants
    from ray._raylet import Config  # pyrefly: ignore[missing-module-attribute]

    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback: what Ray does on its own where there are no clusters
        "RAY_AUTH_MODE": "token",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # what can be imported here can be imported there
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of what it will do some day
    }
    theirs = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in theirs) and not (Path.home() / ".ray" / "auth_token").is_file():
        variables["RAY_AUTH_TOKEN_PATH"] = str(_token())
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    Config.initialize("")  # Ray has read the environment as it was imported
    try:
        with _changed(ray_constants, "ENABLE_RAY_CLUSTER", False):  # it has been read if ray was imported before
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        Config.initialize("")


@cache
def _token() -> Path:
    """Makes a token that nobody else can read. Ray reads it once in a process, so there is one for all clusters of this one."""
    folder = Path(tempfile.mkdtemp(prefix="lockfree-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def _short_folder() -> Iterator[str]:
    """Makes a private folder for Ray's own files, whose name leaves room for those of sockets."""
    root = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="lf-", dir=root if len(root) < 24 else "/tmp")
    try:
        yield folder
    finally:
        end = time.monotonic() + _PATIENCE
        while Path(folder).exists() and time.monotonic() < end:  # processes that are on their way out may still write
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Keeps Ray from printing a page to standard output whenever a process dies."""
    with _changed(ray._private.worker, "print_to_stdstream", lambda *arguments, **options: None):
        yield


@contextlib.contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
