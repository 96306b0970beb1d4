@setlocal
@set "CARD=rtx3090"
@set "VRAM=24GB"
@call "%~dp0launch.bat" %*
