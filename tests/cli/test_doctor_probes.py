"""Packages that tools/doctor.py imports in processes of their own."""

from rfa_mmdet.cli import doctor


def test_package_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0)
    assert doctor.probe("torch") == {"error": "timed out after 0 s"}
