"""The wheel serves every Python 3 on its platform, and works where nothing but torch is installed."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path)}
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(build, check=True, env=environment)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith("llama_adapter_kernels-") and "-py3-none-" in wheel.name
    venv.create(tmp_path / "clean", with_pip=False)
    site = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    # torch and what it needs come from here; the package itself must come from the wheel.
    here = Path(sysconfig.get_paths()["purelib"])
    (site / "torch_from_outside.pth").write_text(f"{here}\n")
    shutil.unpack_archive(wheel, site, "zip")
    script = (
        "import torch, llama_adapter_kernels as lak; q = torch.randn(1, 2, 70, 16); p = q[:, :, :9]; g = torch.ones(2);"
        "a = [lak.zero_gate_attention(q, q, q, p, p, g, backend=b) for b in ('cpu', 'reference')];"
        "torch.testing.assert_close(*a); print(lak.__file__)"
    )
    python = tmp_path / "clean" / "bin" / "python"
    result = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(result.stdout.strip()).is_relative_to(site), result.stdout
