"""Sends log records with OpenTelemetry's own exporter for OTLP/HTTP, and says whether they were taken.

usage: otlp_client.py URL API_KEY DEVICE {none|gzip} COUNT TIME_MS
Prints one JSON object a line.
"""

import json
import sys

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource


def main():
    url, key, device, compression, count, time_ms = sys.argv[1:]
    exporter = OTLPLogExporter(
        endpoint=url,
        headers={"authorization": f"Bearer {key}"},
        compression=Compression.Gzip if compression == "gzip" else Compression.NoCompression,
        timeout=20,
    )
    results = []
    export = exporter.export

    def noted(batch):
        result = export(batch)
        results.append(result.name)
        return result

    exporter.export = noted
    provider = LoggerProvider(resource=Resource.create({"device.id": device, "service.name": "boiler", "service.instance.id": "1"}))
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
    logger = provider.get_logger("net.wifi")
    for nth in range(int(count)):
        logger.emit(
            LogRecord(
                timestamp=int(time_ms) * 1_000_000 + nth,
                severity_number=SeverityNumber.WARN,
                severity_text="WARNING",
                body=f"reconnect {nth}",
                attributes={"rssi": -81, "ok": False, "tried": ["a", "b"]},
            )
        )
    provider.force_flush(20_000)
    provider.shutdown()
    print(json.dumps({"results": sorted(set(results))}), flush=True)


main()
