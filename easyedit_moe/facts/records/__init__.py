"""Files of facts and evaluation records: tables, lists of dicts, and the public layouts of benchmarks."""

from easyedit_moe.facts.records.files import read_json
from easyedit_moe.facts.records.reading import NEUTRAL, load_facts, load_records, parse_records
from easyedit_moe.facts.records.record import PROTOCOLS, EvaluationRecord, FactSet, Probe, ProbeGroup, RecordSet

__all__ = [
    "NEUTRAL",
    "PROTOCOLS",
    "EvaluationRecord",
    "FactSet",
    "Probe",
    "ProbeGroup",
    "RecordSet",
    "load_facts",
    "load_records",
    "parse_records",
    "read_json",
]
