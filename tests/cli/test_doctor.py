"""What ``mmrl doctor`` finds."""

from __future__ import annotations

import importlib.metadata
import os

import pytest
import torch
from typer.testing import CliRunner

from mmrl import cli, doctor
from mmrl.doctor import Check


def test_package_versions():
    assert doctor.package("torch", missing="fail").detail == importlib.metadata.version("torch")
    absent = doctor.package("no-such-distribution", missing="note")
    assert (absent.status, absent.detail) == ("note", "not installed")


def test_libraries_that_load():
    assert doctor.importable("json", "dumps").status == "ok"


def test_a_library_that_does_not_load_names_the_first_cause(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text(
        "try:\n    raise OSError('no such operator')\n"
        "except OSError as error:\n    raise ImportError('sorry') from error\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.importable("broken_library", "anything")
    assert (check.status, check.detail) == ("fail", "anything: OSError: no such operator")
    assert doctor.importable("json", "absent").status == "fail"
    assert doctor.importable("no_such_module", "x").status == "fail"


def test_devices_and_dtypes_of_the_cpu():
    assert doctor.devices()[0] == "cpu"
    assert "fp32" in doctor.working_dtypes("cpu")
    assert doctor.describe_device("cpu").endswith("cores")


def test_a_dtype_that_raises_is_left_out(monkeypatch):
    ones = torch.ones

    def refuse(*size, dtype, **options):
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented")
        return ones(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "ones", refuse)
    assert doctor.working_dtypes("cpu") == ["fp32", "fp16"]


def test_attention_lines_follow_the_backend(monkeypatch):
    found = [("sdpa", True, ""), ("flash", False, "needs a CUDA device")]
    monkeypatch.setattr("diffusion.attention.available_backends", lambda device: found)
    monkeypatch.setattr("mmrl.text.kernels.available_backends", lambda device: found[1:])
    checks = list(doctor.attention("cpu"))
    assert [(c.topic, c.status, c.detail) for c in checks] == [
        ("image attention sdpa on cpu", "ok", "works"),
        ("image attention flash on cpu", "note", "needs a CUDA device"),
        ("text attention flash on cpu", "note", "needs a CUDA device"),
    ]


def test_ocr_reads_a_rendered_text():
    assert doctor.offline_ocr().status == "ok"


@pytest.mark.parametrize(
    ("build", "detail"),
    [
        (lambda config: lambda *a, **k: torch.tensor([0.5]), "scores 0.50"),
        (lambda config: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_ocr_that_does_not_work_is_a_failure(monkeypatch, build, detail):
    monkeypatch.setattr("rewards.ocr.build", build)
    check = doctor.offline_ocr()
    assert check.status == "fail"
    assert detail in check.detail


def test_writable(tmp_path):
    assert doctor.writable(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []
    assert doctor.writable(tmp_path / "absent").status == "fail"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("fail", 1)])
def test_exit_code(monkeypatch, status, code):
    monkeypatch.setattr(doctor, "examine", lambda: iter([Check("[topic]", status, "its detail")]))
    result = CliRunner().invoke(cli.app, ["doctor"], env={**os.environ, "COLUMNS": "200"})
    assert result.exit_code == code
    assert "[topic]" in result.output
    assert "its detail" in result.output


def test_examine_covers_every_topic(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTS", {"json": "dumps"})
    topics = {check.topic for check in doctor.examine()}
    expected = {"python", "torch", "xformers", "device cpu", "dtypes on cpu", "ocr reward"}
    expected |= {f"{kind} attention sdpa on cpu" for kind in ("image", "text")}
    assert expected | {"import json", "current folder"} <= topics
