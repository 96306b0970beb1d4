@setlocal
@set "CARD=rtx4090"
@set "VRAM=24GB"
@call "%~dp0launch.bat" %*
