"""libFuzzer on requests: `make fuzz`; or with its options, -m tests.wire.fuzz_requests CORPUS."""

import sys

import atheris

with atheris.instrument_imports(include=["fleecenbd.nbd"]):
    from tests.wire import properties


def main() -> None:
    atheris.Setup(sys.argv, properties.requests)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
