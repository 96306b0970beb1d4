@setlocal
@set "CARD=rtx5090"
@set "VRAM=32GB"
@call "%~dp0launch.bat" %*
