@setlocal
@set "CARD=a100_80gb"
@set "VRAM=80GB"
@call "%~dp0launch.bat" %*
