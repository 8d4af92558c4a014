"""Is the memory of a long run flat? Not a test that pytest collects: it takes hours.

    python tests/soak.py --hours 8 --out FOLDER -- --arch cnn --data emodb --repeats 1000

runs `python -m npser.train` with these options for so long, samples its resident memory, and prints the peak of each
hour; interrupted runs go on in the same FOLDER. Exit status 1 when the last hour's peak exceeds the first one's by more
than 2 %, and when the run ends by itself before the time is over with anything but 0, or does not answer the SIGTERM
that ends it. Linux alone: it reads /proc.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

ALLOWED = 1.02


def resident(pid: int) -> float:
    """Resident memory of a process and its children in MB; 0 when it is gone."""
    total = 0.0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) / 1024
    except OSError:
        return 0.0
    return total + sum(resident(int(child)) for child in children)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8.0, help="how long (default: 8)")
    parser.add_argument("--hour", type=float, default=3600.0, help="seconds that count as an hour, to try it out")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("options", nargs="*", help="of npser.train, behind --")
    options = parser.parse_args()
    command = [sys.executable, "-m", "npser.train", "--out", options.out, *options.options]
    peaks: list[float] = []
    samples = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        started = time.monotonic()
        while run.poll() is None and (elapsed := time.monotonic() - started) < options.hours * options.hour:
            hour = int(elapsed // options.hour)
            peaks += [0.0] * (hour + 1 - len(peaks))
            peaks[hour] = max(peaks[hour], resident(run.pid))
            samples += 1
            time.sleep(options.every)
        status = run.poll()
        if status is None:
            run.send_signal(signal.SIGTERM)  # SIGINT is ignored below a shell's background job
            run.wait()
    print(f"{' '.join(command[1:])}: {samples} samples in {(time.monotonic() - started) / options.hour:.2f} h")
    for hour, peak in enumerate(peaks):
        print(f"hour {hour + 1}: peak {peak:.0f} MB")
    if status not in (None, 0):
        print(f"the run ended by itself with status {status}")
        return 1
    if status is None and run.returncode != 130:
        print(f"the run did not answer SIGTERM: it ended with status {run.returncode}")
        return 1
    ratio = peaks[-1] / peaks[0]
    print(f"last against first: {100 * (ratio - 1):+.1f} %")
    return int(ratio > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
