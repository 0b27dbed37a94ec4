"""Folders on a disk or in a bucket (gs://…, s3://…), as Orbax takes them."""

import importlib.util
import os
from pathlib import Path, PurePath
from typing import Any

from etils import epath

from ftjax.errors import UserError

PACKAGES = {
    "gs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
}  # scheme: the package it needs, the extra that has it


def scheme(directory: str | os.PathLike) -> str:
    """ "gs" or "s3"; "" for a folder on a disk. UserError for others."""
    name, found, _ = os.fspath(directory).partition("://")
    if found and name not in PACKAGES:
        raise UserError(f"{directory}: a folder, or a bucket as gs://BUCKET/PATH or s3://BUCKET/PATH")
    return name if found else ""


def folder(directory: str | os.PathLike) -> Any:
    """A pathlib.Path, or for a bucket one that is used like it. UserError where its package is missing."""
    kind = scheme(directory)
    if not kind:
        return Path(directory).absolute()
    package, extra = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{directory}: {kind}:// needs {package}: pip install 'ftjax[{extra}]'")
    import fsspec.config

    for name in ("gcs", "gs", "s3"):  # others write there: what was listed before says nothing
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    if kind == "s3":
        _teach_orbax_s3()
    return epath.Path(os.fspath(directory))


def _teach_orbax_s3() -> None:
    """Orbax 0.12 gives TensorStore a driver for gs:// and for local paths alone, though it has one for S3."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    if getattr(tensorstore_utils, "_ftjax_s3", False):
        return
    of_gcs, is_gcs, normal = (
        gcs_utils.get_kvstore_for_gcs,
        tensorstore_utils._use_gcs_driver,
        tensorstore_utils._normalize_path,
    )

    def spec(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gcs(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        given = {"endpoint": os.environ.get("AWS_ENDPOINT_URL"), "aws_region": region}
        return {"driver": "s3", "bucket": bucket, "path": key} | {k: v for k, v in given.items() if v}

    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3://") or is_gcs(path)
    tensorstore_utils._normalize_path = lambda path: (
        normal(path).replace("s3:/", "s3://").replace(":///", "://")
    )
    tensorstore_utils._ftjax_s3 = True  # type: ignore[attr-defined]


def files(root: Any) -> dict[str, Any]:
    """{path below `root`: file} of all files there."""
    found, folders = {}, [root]
    while folders:
        for path in folders.pop().iterdir():  # epath's walk() of buckets gives other paths
            if path.is_dir():
                folders.append(path)
            else:
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def remove(root: Any) -> None:
    """The folder and all in it, if it is there."""
    epath.Path(root).rmtree(missing_ok=True)


def is_bucket(path: PurePath) -> bool:
    return bool(scheme(path))
