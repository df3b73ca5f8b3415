"""Flags of torch that are switched during a loan: no warning reaches the user, and the user's settings stay."""

import textwrap

import clean_process

SCRIPT = textwrap.dedent("""
    import os, sys, warnings
    import torch
    from torch import nn
    import adaptive_tangents as at


    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.cells, self.last = kind(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.cells(x)[0][:, -1])


    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.attend = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)

        def forward(self, x):
            return self.last(self.attend(self.first(x)).mean(1))


    backends = torch.backends
    names = ("backends.cuda.matmul.fp32_precision", "backends.cudnn.conv.fp32_precision", "backends.fp32_precision",
        "backends.cudnn.rnn.fp32_precision", "backends.mkldnn.matmul.fp32_precision", "backends.mkldnn.enabled",
        "backends.mkldnn.conv.fp32_precision", "backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32",
        "backends.cudnn.enabled", "torch.get_float32_matmul_precision()")


    def settings():
        found = []
        for name in names:
            try:
                found.append(eval(name))
            except RuntimeError:
                found.append("refused")
        return found


    def check(setting):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(setting)
            before = settings()
        nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), Attention()]
        x = torch.randn(3, 2, 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for net in [*nets, *map(Recurrent, (nn.RNN, nn.LSTM, nn.GRU))]:
                net.eval()
                at.tangent_kernel(net, x)
                at.TangentModule(net, at.Fixed())(x).sum().backward()
        assert not caught, [str(warning.message) for warning in caught]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert settings() == before, (before, settings())


    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at.TangentModule(nn.Linear(1, 1), at.Fixed())(torch.ones(2, 1))  # imports a part of torch that warns of itself
    torch.set_warn_always(True)
    torch.set_num_threads(1)
    failed = []
    for setting in sys.argv[1:]:  # each in a process of its own: some settings cannot be taken back
        if (child := os.fork()) == 0:
            check(setting)
            os._exit(0)
        failed += [setting] if os.waitpid(child, 0)[1] else []
    sys.exit(f"failed: {failed}" if failed else 0)
""")


SETTINGS = (
    "pass",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "backends.fp32_precision = 'tf32'",
)


@clean_process.in_one_group
def test_no_warning_of_torch_reaches_the_user_and_settings_stay() -> None:
    made = clean_process.run(SCRIPT, *SETTINGS)
    assert made.returncode == 0, made.stderr[-2000:]
