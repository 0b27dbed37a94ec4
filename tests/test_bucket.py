"""Checkpoints outside the run folder: on another disk, and in buckets of an S3 server (moto's) and a GCS one
(gcp-storage-emulator), through the libraries and drivers that real ones are reached by."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from ftjax import bucket, config
from ftjax.errors import UserError

HERE = pathlib.Path(__file__).parent


@pytest.mark.fast
def test_what_is_no_bucket_is_refused():
    with pytest.raises(UserError, match="ftp://host/x: a folder, or a bucket as gs://BUCKET/PATH or s3://"):
        config.load(None, ["model=m", "data.train=t", "checkpoint.directory=ftp://host/x"])
    assert bucket.scheme("gs://bucket/runs/1") == "gs" and bucket.scheme("/disk/runs") == ""


@pytest.mark.fast
def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(bucket.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: pip install 'ftjax\[gcs\]'"):
        bucket.folder("gs://bucket/runs")


@pytest.mark.fast
def test_files_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("1")
    (tmp_path / "y").write_text("2")
    found = bucket.files(bucket.folder(tmp_path))
    assert list(found) == ["a/b/x", "y"] and found["a/b/x"].read_text() == "1"


def run(output, *overrides, expect=0) -> str:
    rows = [
        {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat down"}]}
    ]
    data = output.parent / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    settings = [
        *(f"model={HERE / 'assets' / 'tiny_model'}", f"data.train={data}", "data.max_length=32"),
        *(f"data.cache_dir={output.parent / 'cache'}", "train.batch_size=2", "train.dtype=float32"),
        *(f"output={output}", "checkpoint.every=2", "report.tensorboard=false", *overrides),
    ]
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "ftjax", "sft", *settings],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def goes_on(output, directory: str, listing) -> None:
    """A run keeps its checkpoints in `directory`, goes on from there, and another run does not take them."""
    where = f"checkpoint.directory={directory}"
    run(output, where, "train.max_steps=5")
    assert not (output / "checkpoints").exists()
    assert listing("") >= {"4", "5", "seals"} and "2" not in listing("")
    assert listing("seals") >= {"4.json", "5.json"}
    said = run(output, where, "train.max_steps=7", "--resume")
    assert "going on from the checkpoint of step 5" in said and "6" in listing("")
    other = output.parent / "other"
    assert "holds checkpoints of another run (steps 6, 7)" in run(other, where, expect=2)


def test_on_another_disk(tmp_path):
    away = tmp_path / "disk" / "checkpoints"
    goes_on(tmp_path / "run", str(away), lambda below: set(os.listdir(away / below)))


def in_a_bucket(tmp_path, scheme: str) -> None:
    import fsspec

    files = fsspec.filesystem(scheme, use_listings_cache=False)
    files.mkdir("bucket")
    where = f"{scheme}://bucket/runs/1"

    def listing(below: str) -> set[str]:
        return {os.path.basename(p.rstrip("/")) for p in files.ls(f"bucket/runs/1/{below}")}

    goes_on(tmp_path / "run", where, listing)
    run(tmp_path / "other", f"checkpoint.directory={where}", "train.max_steps=1", "--overwrite")
    assert {x for x in listing("") if x.isdigit()} == {"1"}
    nowhere = f"checkpoint.directory={scheme}://no-such-bucket/runs"
    said = run(tmp_path / "third", nowhere, "model=/nowhere", expect=2)
    assert f"cannot write to {scheme}://no-such-bucket/runs: " in said


NEEDED = "is not installed: the test extra has it"


def test_in_s3(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason=f"s3fs {NEEDED}")
    moto = pytest.importorskip("moto.server", reason=f"moto {NEEDED}")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        in_a_bucket(tmp_path, "s3")
    finally:
        server.stop()


def test_in_gcs(tmp_path, monkeypatch):
    pytest.importorskip("gcsfs", reason=f"gcsfs {NEEDED}")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=f"gcp-storage-emulator {NEEDED}")
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *args, **kwargs):
        """With the header that Google's has, and that tensorstore goes by when it writes a second time."""
        plain(request, response, storage, *args, **kwargs)
        of_bucket = storage.objects.get(request.params["bucket_name"], {})
        if found := of_bucket.get(request.params["object_id"]):
            response["x-goog-generation"] = found["generation"]

    monkeypatch.setattr(objects, "download", download)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    for name, value in {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # of tensorstore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks of what kind the bucket is, elsewhere
    }.items():
        monkeypatch.setenv(name, value)
    try:
        in_a_bucket(tmp_path, "gs")
    finally:
        server.stop()
