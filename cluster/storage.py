"""Files below a URL, a local directory or whatever fsspec opens; what was written is durable when the call returns."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

# A listing that is remembered would hide what other ranks wrote since.
_OPTIONS = {"use_listings_cache": False}
# Many small files: their journal commits are shared when several are asked for at once.
_SYNC_THREADS = 16


@dataclass(frozen=True)
class Storage:
    """Files below a URL. Picklable; errors are those of the file system that fsspec opens.

    Attributes:
        url: An absolute local path, or a URL that fsspec knows (`s3://bucket/prefix`; credentials and options
            come from the environment, as `AWS_ENDPOINT_URL` and `FSSPEC_S3_…`).
    """

    url: str

    @classmethod
    def at(cls, url: str | Path) -> Storage:
        """Return the storage at a URL or path; a relative path is one of this process's working directory."""
        text = str(url)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).absolute()))

    def below(self, folder: str) -> Storage:
        """Return the storage of a folder in this one."""
        return Storage(f"{self.url}/{folder}")

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        return bytes(self._system.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file at once: it is there whole or not at all, and replaces one of its name.

        This holds for local directories and object stores.
        """
        if not self._is_local:
            self._system.pipe_file(self._path(name), data)
            return
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._sync_folders([path])

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder. Raises if that cannot be determined, unlike fsspec's own."""
        try:
            self._system.info(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one; none where it does not exist."""
        try:
            entries = self._system.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
        return sorted(path.rpartition("/")[2] for path in paths)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file here and in all folders, by name; none where there is nothing."""
        found = self._system.find(self._root, detail=True)
        return {path[len(self._root) + 1 :]: int(entry["size"]) for path, entry in found.items()}

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
        try:
            self._system.rm(self._path(name), recursive=True)
        except FileNotFoundError:
            return
        if self._is_local:
            self._sync_folders([Path(self._path(name))])

    def zarr_store(self, *, read_only: bool) -> Store:
        """Return a Zarr store of this folder. What is written through it is durable after `sync` only."""
        if self._is_local:
            return LocalStore(self._root, read_only=read_only)
        return FsspecStore.from_url(self.url, storage_options=_OPTIONS, read_only=read_only)

    def sync(self, names: Iterable[str]) -> None:
        """Make files durable, and the folders that name them. An object store's already are."""
        if self._is_local:
            paths = [Path(self._path(name)) for name in names]
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                list(pool.map(_sync, paths))
            self._sync_folders(paths)

    def _sync_folders(self, paths: Iterable[Path]) -> None:
        """Sync the folders of `paths`, up to the one that holds the root, which may be new as well."""
        root = Path(self._root)
        folders = {root.parent}
        for path in paths:
            folders.update(folder for folder in path.parents if folder.is_relative_to(root))
        for folder in sorted(folders, reverse=True):
            _sync_folder(folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        system, root = fsspec.core.url_to_fs(self.url, **_OPTIONS)
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _is_local(self) -> bool:
        return isinstance(self._system, LocalFileSystem)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except PermissionError:  # a parent that may be passed through, not read; then it is not new either
        pass
    except OSError as error:
        # Some network file systems cannot sync a folder: its entries are durable already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
