"""What a soak has come to, after its tests."""


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", [])
    lines = [text for report in passed for name, text in report.user_properties if name == "soak"]
    if lines:
        terminalreporter.section("kills")
        for line in lines:
            terminalreporter.write_line(line)
