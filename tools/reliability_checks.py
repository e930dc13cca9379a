"""Checks of resumes, long runs and faulty judges for tools/field_cases.py: R1 to R13."""

from __future__ import annotations
