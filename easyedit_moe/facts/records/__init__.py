"""Evaluation records: CounterFact, ZsRE, KnowEdit and WikiBigEdit files in their public layouts."""

from easyedit_moe.facts.records.reading import load_records, parse_records, read_json
from easyedit_moe.facts.records.record import PROTOCOLS, EvaluationRecord, Probe, ProbeGroup, RecordSet

__all__ = [
    "PROTOCOLS",
    "EvaluationRecord",
    "Probe",
    "ProbeGroup",
    "RecordSet",
    "load_records",
    "parse_records",
    "read_json",
]
